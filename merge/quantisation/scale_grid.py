"""Scales on a grid over a matrix: one per tensor, per row, per group of columns, or per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScaleGrid:
    """A grid of blocks of `block` (rows, columns) over each matrix of a weight of `shape` (..., out, in)."""

    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def cells(self) -> tuple[int, int]:
        """The number of blocks of one matrix, (down, across); blocks at the lower and right edge may be smaller."""
        return -(-self.shape[-2] // self.block[0]), -(-self.shape[-1] // self.block[1])

    def grid_rows(self, first: int, count: int) -> tuple[int, int, Tensor]:
        """Return the grid rows of the weight's rows first .. first + count.

        Rows are counted over all matrices of a stack. Returns the first grid row, the number of grid rows, and for
        each weight row the index of its grid row, counted from the first one, int64 (count,).
        """
        out, cells = self.shape[-2], self.cells[0]
        row = torch.arange(first, first + count)
        cell = (row // out) * cells + (row % out) // self.block[0]
        start = int(cell[0]) if count else 0
        return start, int(cell[-1]) - start + 1 if count else 0, cell - start

    def apply(self, values: Tensor, cells: Tensor, operation: str) -> None:
        """Apply `operation` ("mul_", "div_", ...) to `values` (rows, in) in place, with one operand of `cells` (rows,
        blocks) for each block.
        """
        width, columns = self.block[1], values.shape[1]
        whole = columns // width
        if whole:
            view = values[:, : whole * width].view(values.shape[0], whole, width)
            getattr(view, operation)(cells[:, :whole, None])
        if whole * width < columns:
            getattr(values[:, whole * width :], operation)(cells[:, whole:])

    def block_maxima(self, weight: Tensor) -> Tensor:
        """Return the largest value of each block of `weight` (..., out, in), shape (..., *cells)."""
        rows, columns = self.block
        pad = (0, -self.shape[-1] % columns, 0, -self.shape[-2] % rows)
        padded = torch.nn.functional.pad(weight, pad, value=-torch.inf) if any(pad) else weight
        cells = self.cells
        return padded.reshape(*self.shape[:-2], cells[0], rows, cells[1], columns).amax(dim=(-1, -3))

    def expand(self, cells: Tensor) -> Tensor:
        """Return `cells` (..., *cells) repeated for every element of their blocks, (..., out, in)."""
        rows = cells.repeat_interleave(self.block[0], dim=-2)[..., : self.shape[-2], :]
        return rows.repeat_interleave(self.block[1], dim=-1)[..., : self.shape[-1]]
