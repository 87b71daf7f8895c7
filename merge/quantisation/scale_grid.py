"""Scales on a grid over a matrix: one per tensor, per row, per group of columns, or per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScaleGrid:
    """Blocks of `block` (rows, columns) over weights of `shape` (..., out, in), each matrix with its own grid."""

    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def cells(self) -> tuple[int, int]:
        """The grid's size over one matrix (rows of blocks, blocks per row); blocks at the edges may be smaller."""
        return -(-self.shape[-2] // self.block[0]), -(-self.shape[-1] // self.block[1])

    def rows_of(self, first: int, count: int) -> tuple[int, int, Tensor]:
        """Return which grid rows the weight's rows first .. first + count use: the first, how many, and (count,) each.

        Rows count through all matrices of a stack.
        """
        out, cells = self.shape[-2], self.cells[0]
        row = torch.arange(first, first + count)
        cell = (row // out) * cells + (row % out) // self.block[0]
        start = int(cell[0]) if count else 0
        return start, int(cell[-1]) - start + 1 if count else 0, cell - start

    def combine(self, values: Tensor, cells: Tensor, operation: str) -> None:
        """Apply `operation` ("mul_", "div_", ...) of `cells` (rows, blocks) to `values` (rows, in), in place."""
        width, columns = self.block[1], values.shape[1]
        whole = columns // width
        if whole:
            view = values[:, : whole * width].view(values.shape[0], whole, width)
            getattr(view, operation)(cells[:, :whole, None])
        if whole * width < columns:
            getattr(values[:, whole * width :], operation)(cells[:, whole:])

    def largest(self, weight: Tensor) -> Tensor:
        """Return the largest value of each block of `weight` (..., out, in), shape (..., *cells)."""
        rows, columns = self.block
        pad = (0, -self.shape[-1] % columns, 0, -self.shape[-2] % rows)
        padded = torch.nn.functional.pad(weight, pad, value=-torch.inf) if any(pad) else weight
        cells = self.cells
        return padded.reshape(*self.shape[:-2], cells[0], rows, cells[1], columns).amax(dim=(-1, -3))

    def spread(self, cells: Tensor) -> Tensor:
        """Return `cells` (..., *cells) spread over the weight, (..., out, in)."""
        rows = cells.repeat_interleave(self.block[0], dim=-2)[..., : self.shape[-2], :]
        return rows.repeat_interleave(self.block[1], dim=-1)[..., : self.shape[-1]]
