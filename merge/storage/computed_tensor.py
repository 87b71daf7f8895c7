"""Tensors whose values are computed from stored tensors when they are read: the dense weights of quantised bases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from .lazy_torch import torch
from .safetensors_header import ITEM_BYTES, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

ReadBytes: TypeAlias = "Callable[[TensorRef, int, int], Tensor]"  # bytes first .. stop of a stored tensor, uint8 (n,)


class RowSource(Protocol):
    """Source that computes the rows of a tensor from stored bytes."""

    def rows(self, read: ReadBytes, first: int, count: int) -> Tensor:
        """Return rows first .. first + count of the tensor's 2-D view, (count, shape[-1]) in the tensor's dtype."""


@dataclass(frozen=True)
class ComputedRef(TensorRef):
    """A tensor that no file holds. Its dtype and shape are those of the values that `source` computes.

    `start` and `stop` are bytes of the dense tensor, not of a file. A ComputedRef with another shape, start and stop
    describes some of its rows, as a TensorRef does for a stored tensor. `file` is the file with most of the bytes that
    it is computed from. Only `read_tensor` and `Sources.read` may read it.
    """

    source: RowSource = field(compare=False, repr=False)
    sources: tuple[Path, ...] = ()  # all files that it is computed from

    @property
    def files(self) -> tuple[Path, ...]:
        return self.sources

    def read_into(
        self,
        read: ReadBytes,
        first: int,
        buffer: Tensor,  # (n,) uint8
    ) -> None:
        """Fill `buffer` with the tensor's bytes from byte `first`; rows that it holds in part are computed in full."""
        if not buffer.numel():
            return
        row_bytes = self.shape[-1] * ITEM_BYTES[self.dtype]
        start = self.start + first
        top, stop = start // row_bytes, -(-(start + buffer.numel()) // row_bytes)
        rows = self.source.rows(read, top, stop - top).contiguous().view(torch.uint8).view(-1)
        skipped = start - top * row_bytes
        buffer.copy_(rows[skipped : skipped + buffer.numel()])
