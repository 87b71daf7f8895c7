"""GGUF: blocks of 32 or 256 values with their own scales, dequantised by the gguf package (gguf.quants), row by row.

Plain values (F32, F16, BF16) are tensors like any other, unless llama.cpp's converter has moved their rows or has added
one to them (gguf_names.py): then their rows are put back here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import FileFormatError
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, dense_ref
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.gguf_header import FLOATS, GgufTensor, stored_tensor
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .names import stored_rows

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = "blocks"  # the one stored part: (rows, bytes of a row) uint8, or plain values


def gguf_tensor(
    tensor: GgufTensor, file: Path, heads: int | None = None, offset: bool = False, name: str | None = None
) -> ComputedRef:
    """Return a tensor of a GGUF file, dequantised when it is read, under `name` or its own."""
    stored = stored_tensor(tensor, file)
    dtype = FLOATS.get(tensor.type, "F32")
    scheme = f"gguf {tensor.type}"
    own = name or tensor.name
    return dense_ref(GgufWeight(own, scheme, tensor.shape, {BLOCKS: stored}, dtype, tensor.type, heads, offset))


@dataclass(frozen=True)
class GgufWeight(PackedWeight):
    """One tensor of a GGUF file, as the Hugging Face tensor that it was made from."""

    type: str = "F32"  # of the blocks, as gguf.GGMLQuantizationType names it
    heads: int | None = None  # the rows of each head are interleaved in the file
    offset: bool = False  # the file holds w + 1

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        """Return rows first .. first + count, (count, in) of `dtype`.

        Interleaved rows lie in the bytes of their heads: those are read and dequantised whole.
        Raises FileFormatError for a block whose scale is NaN or infinite.
        """
        start, stop = first, first + count
        order = None
        if self.heads is not None:
            order = stored_rows(self.shape[0], self.heads, self.name)
            if len(self.shape) > 1:
                order = order[start:stop]
                start, stop = (int(order.min()), int(order.max()) + 1) if count else (0, 0)
                order = order - start
        values = self._values(read, start, stop)
        if order is not None:
            values = values[:, order] if len(self.shape) == 1 else values[order]
        return values - 1 if self.offset else values

    def _values(self, read: Read, start: int, stop: int) -> Tensor:
        """Return the stored rows start .. stop, dequantised."""
        part = self.parts[BLOCKS]
        row_bytes = part.nbytes // self.row_count
        raw = read(part, start * row_bytes, stop * row_bytes)
        if self.type in ("F32", "F16", "BF16"):
            return raw.view(TORCH_DTYPES[self.type]).view(stop - start, self.shape[-1]).to(TORCH_DTYPES[self.dtype])
        gguf: Any = import_module("gguf")
        kind = gguf.GGMLQuantizationType[self.type]
        with import_module("numpy").errstate(all="ignore"):  # what is not finite is refused below
            values = torch.from_numpy(gguf.quants.dequantize(raw.view(stop - start, row_bytes).numpy(), kind))
        if not bool(torch.isfinite(values).all()):
            raise FileFormatError(f"{part.file}: tensor {part.name!r}: a block of {self.type} has no finite scale")
        return values
