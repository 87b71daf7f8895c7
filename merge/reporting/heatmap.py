"""Heat map of layers and modules for a terminal: one block character per weight; its height shows the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .module_grid import ModuleGrid, grid_of

if TYPE_CHECKING:
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
SHADES = ("grey42", "grey58", "cyan4", "cyan3", "green3", "yellow3", "orange1", "red1")
NO_WEIGHT = "·"


def level(value: float, low: float, high: float) -> int:
    """Return the index of a block character, from the logarithm of `value` between `low` and `high`.

    0 for values that are not positive; the middle where `low` and `high` are equal.
    """
    if not value > 0:
        return 0
    if not high > low > 0:
        return len(BLOCKS) // 2
    share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return max(0, min(len(BLOCKS) - 1, int(share * len(BLOCKS))))


def strips(values: Mapping[str, float]) -> list[tuple[str, str, float, float]]:
    """Return, for each kind of module, its short name, one character per layer, and its smallest and largest value."""
    grid = grid_of(values)
    known = {(cell.kind, cell.layer): values[name] for name, cell in zip(values, grid.cells, strict=True)}
    positive = [value for value in values.values() if value > 0 and math.isfinite(value)]
    low, high = (min(positive), max(positive)) if positive else (0.0, 0.0)
    lines = []
    for kind in grid.kinds:
        row = [known.get((kind, layer)) for layer in _columns(grid, kind)]
        text = "".join(NO_WEIGHT if value is None else BLOCKS[level(value, low, high)] for value in row)
        present = [value for value in row if value is not None]
        lines.append((grid.short(kind), text, min(present), max(present)))
    return lines


def _columns(grid: ModuleGrid, kind: str) -> list[int | None]:
    """Return the layers of a row; [None] for a kind of module outside the layers."""
    if any(cell.layer is None and cell.kind == kind for cell in grid.cells):
        return [None]
    return [layer for layer in grid.layers if layer is not None]


def heat_table(values: Mapping[str, float], title: str = "|dW| / |W|") -> Table:
    """Return a rich table of `values` by module name: a row per kind of module, with its smallest and largest value."""
    from rich.table import Table
    from rich.text import Text

    grid = grid_of(values)
    numbers = [layer for layer in grid.layers if layer is not None]
    span = f"layers {numbers[0]} .. {numbers[-1]}" if numbers else "weights"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("module")
    table.add_column(span, no_wrap=True)
    table.add_column("smallest", justify="right")
    table.add_column("largest", justify="right")
    for name, strip, least, largest in strips(values):
        text = Text()
        for character in strip:
            text.append(character, style=SHADES[BLOCKS.index(character)] if character in BLOCKS else "dim")
        table.add_row(name, text, f"{least:.2g}", f"{largest:.2g}")
    return table
