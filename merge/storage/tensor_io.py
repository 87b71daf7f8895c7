"""Reading and writing of torch tensors, and the safetensors names of torch dtypes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_merge.errors import FileFormatError
from adapter_merge.files.input_errors import reading

from .computed_tensor import ComputedRef
from .lazy_torch import torch
from .safetensors_header import FLOAT_DTYPES, TensorRef, layout

if TYPE_CHECKING:
    from torch import Tensor

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
}  # fmt: skip


class _TorchDtypes(Mapping[str, "torch.dtype"]):
    """A map from safetensors name to torch dtype that imports torch on first use."""

    def __getitem__(self, name: str) -> torch.dtype:
        dtype = getattr(torch, TORCH_NAMES[name])
        assert isinstance(dtype, torch.dtype)
        return dtype

    def __iter__(self) -> Iterator[str]:
        return iter(TORCH_NAMES)

    def __len__(self) -> int:
        return len(TORCH_NAMES)


COMPUTED_BYTES = 4 << 20  # of a computed tensor, in one step
TORCH_DTYPES: Mapping[str, torch.dtype] = _TorchDtypes()
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as users name dtypes


@cache
def dtype_names() -> Mapping[torch.dtype, str]:
    """Return the safetensors names by torch dtype."""
    return {TORCH_DTYPES[name]: name for name in TORCH_NAMES}


def pread_into(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill `buffer` from byte `offset` of `fd`. Raises FileFormatError when the file ends too early."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise FileFormatError(
                f"{what}: the file ends at byte {offset + done}",
                expected=f"{len(buffer) - done} more bytes",
                hint="the file was truncated while it was read, or its disk fails",
            )
        done += got


def read_tensor(ref: TensorRef) -> Tensor:
    """Read one tensor in full, on the CPU, in its dtype. Raises FileFormatError for a short file."""
    if ref.dtype not in TORCH_DTYPES:
        raise FileFormatError(f"{ref.file}: torch has no dtype for {ref.dtype} (tensor {ref.name!r})")
    raw = torch.empty(ref.nbytes, dtype=torch.uint8)
    step = ref.nbytes
    if isinstance(ref, ComputedRef):  # in blocks, so that the temporaries of a scheme stay small
        step = max(1, COMPUTED_BYTES // max(1, ref.row_bytes)) * ref.row_bytes
    for first in range(0, ref.nbytes, max(1, step)):
        read_into(ref, first, raw[first : first + step])
    return raw.view(TORCH_DTYPES[ref.dtype]).reshape(ref.shape)


def read_into(
    ref: TensorRef,
    first: int,
    buffer: Tensor,  # (n,) uint8 on the CPU
) -> None:
    """Fill `buffer` from byte `first` of the tensor. Raises FileFormatError for a short or unreadable file."""
    if isinstance(ref, ComputedRef):
        ref.read_into(read_bytes, first, buffer)
        return
    with reading(ref.file), ref.file.open("rb") as stream:
        pread_into(stream.fileno(), buffer.numpy().data, ref.start + first, str(ref.file))


def read_bytes(ref: TensorRef, first: int, stop: int) -> Tensor:
    """Return bytes first .. stop of the tensor, uint8 (n,)."""
    raw = torch.empty(stop - first, dtype=torch.uint8)
    read_into(ref, first, raw)
    return raw


def holds_finite(ref: TensorRef) -> bool:
    """Return False for a stored tensor of floats with NaN or infinity; read in blocks."""
    if ref.dtype not in FLOAT_DTYPES:
        return True
    for first in range(0, ref.nbytes, COMPUTED_BYTES):
        piece = torch.empty(min(COMPUTED_BYTES, ref.nbytes - first), dtype=torch.uint8)
        read_into(ref, first, piece)
        if not all_finite(piece.view(TORCH_DTYPES[ref.dtype])):
            return False
    return True


def all_finite(tensor: Tensor) -> bool:
    """Return True when no element is NaN or infinite; one pass, no temporaries."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` (on any device) to a new file, in the given order, and fsync it."""
    head, refs = layout(file, ((name, dtype_names()[t.dtype], tuple(t.shape)) for name, t in tensors.items()), metadata)
    with file.open("xb") as stream:
        stream.write(head)
        for ref in refs:
            stream.write(raw_bytes(tensors[ref.name].detach().cpu()) if ref.nbytes else b"")
        stream.flush()
        os.fsync(stream.fileno())
