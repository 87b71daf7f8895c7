"""Bytes <-> torch tensors: reading references, and safetensors names for torch dtypes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileFormatError
from .headers import TensorRef, layout

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


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
    """The whole tensor, on the CPU, in its own dtype. Raises FileFormatError on a short file."""
    if ref.dtype not in TORCH_DTYPES:
        raise FileFormatError(f"{ref.file}: torch has no dtype for {ref.dtype} (tensor {ref.name!r})")
    raw = torch.empty(ref.nbytes, dtype=torch.uint8)
    if ref.nbytes:
        with ref.file.open("rb") as stream:
            pread_into(stream.fileno(), raw.numpy().data, ref.start, str(ref.file))
    return raw.view(TORCH_DTYPES[ref.dtype]).reshape(ref.shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` (on any device) to a new file, in the given order, and fsync it."""
    head, refs = layout(file, ((name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()), metadata)
    with file.open("xb") as stream:
        stream.write(head)
        for ref in refs:
            stream.write(raw_bytes(tensors[ref.name].detach().cpu()) if ref.nbytes else b"")
        stream.flush()
        os.fsync(stream.fileno())
