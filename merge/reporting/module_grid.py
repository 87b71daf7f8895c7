"""Division of module paths into layer number and kind of module, for tables and heat maps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER = re.compile(r"(?P<before>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Cell:
    """Layer and kind of one module; `layer` is None for a module outside the layers (an embedding, a head)."""

    name: str
    layer: int | None
    kind: str


def cell_of(name: str) -> Cell:
    """Parse a module or tensor name: model.layers.3.self_attn.q_proj.weight is layer 3, kind self_attn.q_proj."""
    name = name.removesuffix(".weight")
    match = LAYER.fullmatch(name)
    if match is None:
        return Cell(name, None, name)
    return Cell(name, int(match["layer"]), match["kind"])


@dataclass(frozen=True)
class ModuleGrid:
    """All cells, the layers in the order of their numbers, and the kinds in the order of their first appearance."""

    cells: tuple[Cell, ...]
    layers: tuple[int | None, ...]
    kinds: tuple[str, ...]

    def short(self, kind: str) -> str:
        """Return the shortest end of a kind's path that no other kind has: q_proj, attention.output.dense."""
        parts = kind.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if sum(path == end or path.endswith(f".{end}") for path in self.kinds) == 1:
                return end
        return kind


def grid_of(names: Iterable[str]) -> ModuleGrid:
    """Return the grid of module or tensor names."""
    cells = tuple(cell_of(name) for name in names)
    numbers = sorted({cell.layer for cell in cells if cell.layer is not None})
    outside = any(cell.layer is None for cell in cells)
    layers: tuple[int | None, ...] = (*numbers, *((None,) if outside else ()))
    return ModuleGrid(cells, layers, tuple(dict.fromkeys(cell.kind for cell in cells)))
