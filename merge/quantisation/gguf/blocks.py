"""Tensors of GGUF files: blocks of 32 or 256 values with their own scales, dequantised by the gguf package.

llama.cpp's converter permutes rows of some tensors and adds 1 to some norms (names.py). Both are undone here, for
quantised and for float tensors.
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

BLOCKS = "blocks"  # the only stored part: uint8 (rows, bytes per row), or float values


def gguf_tensor(
    tensor: GgufTensor, file: Path, heads: int | None = None, offset: bool = False, name: str | None = None
) -> ComputedRef:
    """Return a tensor of a GGUF file as a ComputedRef with the name `name`, or its own name without one."""
    stored = stored_tensor(tensor, file)
    dtype = FLOATS.get(tensor.type, "F32")
    scheme = f"gguf {tensor.type}"
    own = name or tensor.name
    return dense_ref(GgufWeight(own, scheme, tensor.shape, {BLOCKS: stored}, dtype, tensor.type, heads, offset))


@dataclass(frozen=True)
class GgufWeight(PackedWeight):
    """A tensor of a GGUF file that reads as the Hugging Face tensor from which llama.cpp made it."""

    type: str = "F32"  # of the blocks, as gguf.GGMLQuantizationType names it
    heads: int | None = None  # number of heads where the file interleaves the rows of each head
    offset: bool = False  # the file holds w + 1

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        """Return rows first .. first + count, (count, in) of `dtype`.

        Of interleaved rows, the span of stored rows that contains the requested ones is read and dequantised.
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
        """Return stored rows start .. stop, dequantised, (rows, in) of `dtype`."""
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
