"""Module paths as a grid: layers along one side, kinds of modules along the other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER = re.compile(r"(?P<before>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Cell:
    """Where one module stands; `layer` is None for a module outside of all layers (an embedding, a head)."""

    name: str
    layer: int | None
    kind: str


def cell_of(name: str) -> Cell:
    """model.layers.3.self_attn.q_proj -> layer 3, kind self_attn.q_proj; a `.weight` at the end is dropped."""
    name = name.removesuffix(".weight")
    match = LAYER.fullmatch(name)
    if match is None:
        return Cell(name, None, name)
    return Cell(name, int(match["layer"]), match["kind"])


@dataclass(frozen=True)
class ModuleGrid:
    """All cells, with both sides in a stable order: layers by number, kinds as they first appear."""

    cells: tuple[Cell, ...]
    layers: tuple[int | None, ...]
    kinds: tuple[str, ...]

    def short(self, kind: str) -> str:
        """The end of a kind's path that tells it from the others: q_proj, attention.output.dense."""
        parts = kind.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in self.kinds) == 1:
                return end
        return kind


def grid_of(names: Iterable[str]) -> ModuleGrid:
    """The grid of these module or tensor names."""
    cells = tuple(cell_of(name) for name in names)
    numbers = sorted({cell.layer for cell in cells if cell.layer is not None})
    outside = any(cell.layer is None for cell in cells)
    layers: tuple[int | None, ...] = (*numbers, *((None,) if outside else ()))
    return ModuleGrid(cells, layers, tuple(dict.fromkeys(cell.kind for cell in cells)))
