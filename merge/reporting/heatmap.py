"""The heat map layer x module for a terminal: one block character per weight, the taller the larger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .module_grid import ModuleGrid, grid_of

if TYPE_CHECKING:
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
SHADES = ("grey42", "grey58", "cyan4", "cyan3", "green3", "yellow3", "orange1", "red1")
NOTHING = "·"


def level(value: float, low: float, high: float) -> int:
    """0 .. 7, evenly over the logarithm between `low` and `high`; over equal bounds, the middle."""
    if not value > 0:
        return 0
    if not high > low > 0:
        return len(BLOCKS) // 2
    share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return max(0, min(len(BLOCKS) - 1, int(share * len(BLOCKS))))


def strips(values: Mapping[str, float]) -> list[tuple[str, str, float, float]]:
    """Per kind of module: its short name, one character per layer, the least and the largest value."""
    grid = grid_of(values)
    known = {(cell.kind, cell.layer): values[name] for name, cell in zip(values, grid.cells, strict=True)}
    positive = [value for value in values.values() if value > 0 and math.isfinite(value)]
    low, high = (min(positive), max(positive)) if positive else (0.0, 0.0)
    lines = []
    for kind in grid.kinds:
        row = [known.get((kind, layer)) for layer in _columns(grid, kind)]
        text = "".join(NOTHING if value is None else BLOCKS[level(value, low, high)] for value in row)
        there = [value for value in row if value is not None]
        lines.append((grid.short(kind), text, min(there), max(there)))
    return lines


def _columns(grid: ModuleGrid, kind: str) -> list[int | None]:
    """A kind outside of all layers is one cell of its own."""
    if any(cell.layer is None and cell.kind == kind for cell in grid.cells):
        return [None]
    return [layer for layer in grid.layers if layer is not None]


def heat_table(values: Mapping[str, float], title: str = "|dW| / |W|") -> Table:
    """A rich table of `values` by module name: a strip over the layers per kind, with its least and largest value."""
    from rich.table import Table
    from rich.text import Text

    grid = grid_of(values)
    numbers = [layer for layer in grid.layers if layer is not None]
    span = f"layers {numbers[0]} .. {numbers[-1]}" if numbers else "weights"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("module")
    table.add_column(span, no_wrap=True)
    table.add_column("least", justify="right")
    table.add_column("largest", justify="right")
    for name, strip, least, largest in strips(values):
        text = Text()
        for character in strip:
            text.append(character, style=SHADES[BLOCKS.index(character)] if character in BLOCKS else "dim")
        table.add_row(name, text, f"{least:.2g}", f"{largest:.2g}")
    return table
