"""Edits of one stored tensor, applied to one block of rows at a time.

    CanonicalForm    W' = diag(row_scale) (W0 + up down) diag(col_scale)              (canonical_form.py)
    RowRange         an edit of some rows: one expert of a fused weight, q in a fused qkv
    RowsReplaced     single rows replaced: trained tokens of an embedding
    Replaced         every row replaced: a trained head, the frozen residual that was saved beside an adapter
    WholeReplaced    a whole weight that was computed for one W0, with its change
    InTurn           several edits of one tensor, applied one after the other

All edits are immutable; any number of threads may apply them to blocks in any order. The engine uses only the six
members of `BlockEdit`. Sums of a pass are float64 (column norms) or int64 (histograms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from adapter_merge.errors import UnsupportedError
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_into

if TYPE_CHECKING:
    from torch import Tensor


class BlockEdit(Protocol):
    """The change W0 -> W' of one stored tensor, viewed as a matrix (rows, last dimension)."""

    @property
    def needs_pass(self) -> bool:
        """True while a pass over all rows must be made before the edit can be applied.

        A pass adds up `pass_sums` of all blocks and hands the total to `with_pass_sums`; the edit that this returns
        may need another pass.
        """

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BlockEdit:
        """Return the same edit on another device or in another dtype."""

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        """Return what this block (n, columns) adds to the sums of the next pass; the block is overwritten.

        The sums are squares per column (float64) for column norms, or histograms (int64) for TIES thresholds.
        """

    def with_pass_sums(self, sums: Tensor) -> BlockEdit:
        """Return the edit that uses `sums`, the total of `pass_sums` over all blocks."""

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        """Turn `block` (n, columns), the rows start .. start+n of W0, into the same rows of W', in place.

        Returns the rows' scale (n,) where the edit has one, else None.
        """

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        """Return W' - W0 (n, columns) of the same rows, in the block's dtype; the block is not changed."""


class _WithoutPass:
    """Base class of edits that can be applied without a pass over all rows."""

    needs_pass = False

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        raise AssertionError("this edit needs no first pass")

    def with_pass_sums(self, sums: Tensor) -> Self:
        raise AssertionError("this edit needs no first pass")


@dataclass(frozen=True, eq=False)
class RowRange:
    """An `edit` that applies to the rows first .. stop only; the edit itself counts its rows from 0."""

    edit: BlockEdit
    first: int
    stop: int

    @property
    def needs_pass(self) -> bool:
        return self.edit.needs_pass

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RowRange:
        return replace(self, edit=self.edit.to(device, dtype))

    def _rows_in_range(self, block: Tensor, start: int) -> tuple[Tensor, int]:
        """Return the rows of `block` that lie in the range, as a view, and the first row's number within the range."""
        begin, end = max(start, self.first), min(start + block.shape[0], self.stop)
        return block[max(0, begin - start) : max(0, end - start)], max(0, begin - self.first)

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        rows, first = self._rows_in_range(block, start)
        return self.edit.pass_sums(rows, first)

    def with_pass_sums(self, sums: Tensor) -> RowRange:
        return replace(self, edit=self.edit.with_pass_sums(sums))

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        rows, first = self._rows_in_range(block, start)
        if rows.shape[0]:
            self.edit.apply_(rows, first)
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        delta = torch.zeros_like(block)
        rows, first = self._rows_in_range(block, start)
        if rows.shape[0]:
            target, _ = self._rows_in_range(delta, start)
            target.copy_(self.edit.delta_rows(rows, first))
        return delta


@dataclass(frozen=True, eq=False)
class RowsReplaced(_WithoutPass):
    """The replacement of row `indices[i]` by `values[i]`; all other rows stay unchanged."""

    indices: Tensor  # (n,) int64, each once
    values: Tensor  # (n, columns)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RowsReplaced:
        return RowsReplaced(self.indices.to(device), self.values.to(device=device, dtype=dtype))

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        inside = (self.indices >= start) & (self.indices < start + block.shape[0])
        block[self.indices[inside] - start] = self.values[inside].to(block.dtype)
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        after = block.clone()
        self.apply_(after, start)
        return after.sub_(block)


@dataclass(frozen=True, eq=False)
class Replaced(_WithoutPass):
    """The replacement of every row by the same row of `source`, a stored tensor of the same shape."""

    source: TensorRef
    device: torch.device | str | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Replaced:
        return replace(self, device=device or self.device)

    def _read_rows(self, start: int, count: int, columns: int) -> Tensor:
        """Return rows start .. start + count of `source`, (count, columns), in its dtype."""
        dtype = TORCH_DTYPES[self.source.dtype]
        raw = torch.empty(count * columns * dtype.itemsize, dtype=torch.uint8)
        read_into(self.source, start * columns * dtype.itemsize, raw)
        return raw.view(dtype).view(count, columns)

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        block.copy_(self._read_rows(start, *block.shape))
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        return self._read_rows(start, *block.shape).to(block).sub_(block)


@dataclass(frozen=True, eq=False)
class WholeReplaced(_WithoutPass):
    """The replacement of a weight by one that was computed from it, so that it applies to this W0 only.

    Raises UnsupportedError for a block with other values: after another adapter, the replacement would undo its change.
    """

    before: Tensor  # (rows, columns) W0, in the base's dtype
    after: Tensor  # (rows, columns) W'
    change: Tensor  # (rows, columns) W' - W0, rounded from float64

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WholeReplaced:
        after, change = (part.to(device=device, dtype=dtype) for part in (self.after, self.change))
        return WholeReplaced(self.before.to(device), after, change)

    def transposed(self) -> WholeReplaced:
        """Return the edit of W0^T."""
        return WholeReplaced(*(part.T.contiguous() for part in (self.before, self.after, self.change)))

    def _rows_of(self, block: Tensor, start: int) -> slice:
        """Return the slice of the rows of `block`. Raises UnsupportedError where they are not rows of `before`."""
        rows = slice(start, start + block.shape[0])
        if not torch.equal(block, self.before[rows].to(block)):
            raise UnsupportedError(
                "a weight that PEFT's layer computed from the base cannot be changed by another adapter before it",
                hint="merge this adapter first, then the other into the result",
            )
        return rows

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        block.copy_(self.after[self._rows_of(block, start)])
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        return self.change[self._rows_of(block, start)].to(block)


@dataclass(frozen=True, eq=False)
class InTurn:
    """Several edits of one tensor, applied one after the other.

    Passes are made in the order of the edits, since a later edit acts on the result of the earlier ones. Only
    `RowRange`s share a pass: they are experts, whose rows are disjoint.
    """

    edits: tuple[BlockEdit, ...]

    @property
    def needs_pass(self) -> bool:
        return any(edit.needs_pass for edit in self.edits)

    def _edits_of_next_pass(self) -> list[int]:
        """Return the indices of the edits that the next pass is made for."""
        waiting = [index for index, edit in enumerate(self.edits) if edit.needs_pass]
        return waiting if all(isinstance(self.edits[index], RowRange) for index in waiting) else waiting[:1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> InTurn:
        return InTurn(tuple(edit.to(device, dtype) for edit in self.edits))

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        pass_indices = self._edits_of_next_pass()
        sums = []
        for index, edit in enumerate(self.edits[: pass_indices[-1] + 1]):
            if index in pass_indices:
                sums.append(edit.pass_sums(block.clone(), start))
            else:
                edit.apply_(block, start)
        return torch.stack(sums)

    def with_pass_sums(self, sums: Tensor) -> InTurn:
        edits = list(self.edits)
        for index, row in zip(self._edits_of_next_pass(), sums, strict=True):
            edits[index] = edits[index].with_pass_sums(row)
        return InTurn(tuple(edits))

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        for edit in self.edits:
            edit.apply_(block, start)
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        after = block.clone()
        self.apply_(after, start)
        return after.sub_(block)


def chain_edits(edits: Sequence[BlockEdit]) -> BlockEdit:
    """Return one edit that applies all of `edits` in their order."""
    return edits[0] if len(edits) == 1 else InTurn(tuple(edits))


def apply_edit(edit: BlockEdit, weight: Tensor) -> Tensor:
    """Return W' for a whole stored tensor W0 of any shape, in its dtype.

    The result is that of the engine, which applies the same edit block by block.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    while edit.needs_pass:
        edit = edit.with_pass_sums(edit.pass_sums(rows.clone(), 0))
    after = rows.clone()
    edit.apply_(after, 0)
    return after.reshape(weight.shape)
