"""Whether two stored tensors hold the same bytes, or the same numbers."""

from __future__ import annotations

from contextlib import ExitStack

from .input_errors import reading
from .lazy_torch import torch
from .safetensors_header import FLOAT_DTYPES, TensorRef
from .tensor_io import TORCH_DTYPES, read_tensor


def same_values(one: TensorRef, other: TensorRef) -> bool:
    """True when both hold the same numbers: the same bytes, or a wider dtype with nothing but zeros behind them."""
    if one.dtype == other.dtype or one.shape != other.shape or not {one.dtype, other.dtype} <= set(FLOAT_DTYPES):
        return same_bytes(one, other)
    wide = torch.promote_types(TORCH_DTYPES[one.dtype], TORCH_DTYPES[other.dtype])
    return torch.equal(read_tensor(one).to(wide), read_tensor(other).to(wide))


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """True when both hold the same dtype, shape and bytes; read in pieces of 16 MiB."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with ExitStack() as stack:
        streams = []
        for ref in (one, other):
            with reading(ref.file):
                streams.append(stack.enter_context(ref.file.open("rb")))
                streams[-1].seek(ref.start)
        remaining = one.nbytes
        while remaining:
            size = min(remaining, 16 << 20)
            with reading(one.file):
                piece = streams[0].read(size)
            with reading(other.file):
                if piece != streams[1].read(size):
                    return False
            remaining -= size
    return True
