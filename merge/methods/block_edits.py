"""What happens to one stored tensor, block of rows by block of rows: the canonical form and its few relatives.

    CanonicalForm    W' = diag(row_scale) (W0 + up down) diag(col_scale)              (canonical_form.py)
    RowRange         an edit of some rows: one expert of a fused weight, q in a fused qkv
    RowsReplaced     single rows replaced: trained tokens of an embedding
    Replaced         every row replaced: a trained head, the frozen residual that was saved beside an adapter
    InTurn           several edits of one tensor

All are immutable and may be applied to blocks in any order by any number of threads. The six names of `BlockEdit`
are all that an engine may use. Sums over a first pass (column norms, histograms) are kept in float64 or int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from adapter_merge.storage.input_errors import reading
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES, pread_into

if TYPE_CHECKING:
    from torch import Tensor


class BlockEdit(Protocol):
    """W0 -> W' for one stored tensor, seen as a matrix (rows, columns) of its last dimension."""

    @property
    def needs_pass(self) -> bool:
        """True while a pass over all rows must be made before the edit can be applied.

        A pass adds up `pass_sums` of all blocks and hands the total to `with_pass_sums`; the edit that this returns
        may need another pass.
        """

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BlockEdit:
        """The same edit on another device or in another dtype."""

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        """Return what this block (n, columns) adds to the sums of the next pass; the block is overwritten.

        The sums are squares per column (float64) for column norms, or histograms (int64) for TIES thresholds.
        """

    def with_pass_sums(self, sums: Tensor) -> BlockEdit:
        """Return the edit that uses `sums`, the total of `pass_sums` over all blocks."""

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        """block (n, columns), rows start .. start+n of W0, becomes the same rows of W', in place."""

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        """The same rows of W' - W0; the block is left as it is."""


class _OnePass:
    """An edit that needs no pass before it."""

    needs_pass = False

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        raise AssertionError("this edit needs no first pass")

    def with_pass_sums(self, sums: Tensor) -> Self:
        raise AssertionError("this edit needs no first pass")


@dataclass(frozen=True, eq=False)
class RowRange:
    """`edit` of the rows first .. stop alone; its own rows count from 0."""

    edit: BlockEdit
    first: int
    stop: int

    @property
    def needs_pass(self) -> bool:
        return self.edit.needs_pass

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RowRange:
        return replace(self, edit=self.edit.to(device, dtype))

    def _part(self, block: Tensor, start: int) -> tuple[Tensor, int]:
        """The rows of `block` that lie in the range, as a view, and their place in it."""
        begin, end = max(start, self.first), min(start + block.shape[0], self.stop)
        return block[max(0, begin - start) : max(0, end - start)], max(0, begin - self.first)

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        part, place = self._part(block, start)
        return self.edit.pass_sums(part, place)

    def with_pass_sums(self, sums: Tensor) -> RowRange:
        return replace(self, edit=self.edit.with_pass_sums(sums))

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        part, place = self._part(block, start)
        if part.shape[0]:
            self.edit.apply_(part, place)
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        delta = torch.zeros_like(block)
        part, place = self._part(block, start)
        if part.shape[0]:
            target, _ = self._part(delta, start)
            target.copy_(self.edit.delta_rows(part, place))
        return delta


@dataclass(frozen=True, eq=False)
class RowsReplaced(_OnePass):
    """Row `indices[i]` becomes values[i]; every other row stays."""

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
class Replaced(_OnePass):
    """Every row is read from `source`, a tensor of the same shape."""

    source: TensorRef
    device: torch.device | str | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Replaced:
        return replace(self, device=device or self.device)

    def _rows(self, start: int, count: int, columns: int) -> Tensor:
        dtype = TORCH_DTYPES[self.source.dtype]
        raw = torch.empty(count * columns * dtype.itemsize, dtype=torch.uint8)
        with reading(self.source.file), self.source.file.open("rb") as stream:
            offset = self.source.start + start * columns * dtype.itemsize
            pread_into(stream.fileno(), raw.numpy().data, offset, str(self.source.file))
        return raw.view(dtype).view(count, columns)

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        block.copy_(self._rows(start, *block.shape))
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        return self._rows(start, *block.shape).to(block).sub_(block)


@dataclass(frozen=True, eq=False)
class InTurn:
    """Several edits of one tensor, one after the other.

    Those that need a pass get it in their order, since the later ones act on what the earlier ones leave; only edits of
    single rows (experts, whose rows are disjoint) share one.
    """

    edits: tuple[BlockEdit, ...]

    @property
    def needs_pass(self) -> bool:
        return any(edit.needs_pass for edit in self.edits)

    def _next(self) -> list[int]:
        """The edits whose pass can be taken now."""
        waiting = [index for index, edit in enumerate(self.edits) if edit.needs_pass]
        return waiting if all(isinstance(self.edits[index], RowRange) for index in waiting) else waiting[:1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> InTurn:
        return InTurn(tuple(edit.to(device, dtype) for edit in self.edits))

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        wanted = self._next()
        sums = []
        for index, edit in enumerate(self.edits[: wanted[-1] + 1]):
            if index in wanted:
                sums.append(edit.pass_sums(block.clone(), start))
            else:
                edit.apply_(block, start)
        return torch.stack(sums)

    def with_pass_sums(self, sums: Tensor) -> InTurn:
        edits = list(self.edits)
        for index, row in zip(self._next(), sums, strict=True):
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


def in_turn(edits: Sequence[BlockEdit]) -> BlockEdit:
    """One edit for all of `edits`."""
    return edits[0] if len(edits) == 1 else InTurn(tuple(edits))


def applied(edit: BlockEdit, weight: Tensor) -> Tensor:
    """W' for the whole stored tensor W0 of any shape, in its dtype; what the engine does, without blocks."""
    rows = weight.reshape(-1, weight.shape[-1])
    while edit.needs_pass:
        edit = edit.with_pass_sums(edit.pass_sums(rows.clone(), 0))
    after = rows.clone()
    edit.apply_(after, 0)
    return after.reshape(weight.shape)
