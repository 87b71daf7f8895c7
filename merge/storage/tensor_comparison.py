"""Whether two stored tensors hold the same bytes, or the same numbers."""

from __future__ import annotations

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
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        remaining = one.nbytes
        while remaining:
            size = min(remaining, 16 << 20)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True
