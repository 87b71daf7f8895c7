"""Comparison of two stored tensors, by bytes or by values."""

from __future__ import annotations

from contextlib import ExitStack

from adapter_merge.files.input_errors import reading

from .computed_tensor import ComputedRef
from .lazy_torch import torch
from .safetensors_header import FLOAT_DTYPES, TensorRef
from .tensor_io import COMPUTED_BYTES, TORCH_DTYPES, read_bytes, read_tensor


def same_values(first: TensorRef, second: TensorRef) -> bool:
    """Return True when both hold the same values: the same bytes, or two float dtypes that convert to equal values."""
    if (
        first.dtype == second.dtype
        or first.shape != second.shape
        or not {first.dtype, second.dtype} <= set(FLOAT_DTYPES)
    ):
        return same_bytes(first, second)
    wide = torch.promote_types(TORCH_DTYPES[first.dtype], TORCH_DTYPES[second.dtype])
    return torch.equal(read_tensor(first).to(wide), read_tensor(second).to(wide))


def same_but_for_rounding(first: TensorRef, second: TensorRef) -> bool:
    """Return True for equal bytes, and for two float dtypes of which one holds the rounded values of the other.

    float16 and bfloat16 cannot represent all values of each other: both tensors may be roundings of a third one.
    """
    if first.dtype == second.dtype or first.shape != second.shape:
        return same_bytes(first, second)
    if not {first.dtype, second.dtype} <= set(FLOAT_DTYPES):
        return False
    first_values, second_values = read_tensor(first), read_tensor(second)
    if {first.dtype, second.dtype} == {"F16", "BF16"}:
        eps = torch.finfo(first_values.dtype).eps + torch.finfo(second_values.dtype).eps
        return torch.allclose(first_values.float(), second_values.float(), rtol=eps, atol=1e-7)
    wide, narrow = sorted((first_values, second_values), key=lambda values: -values.dtype.itemsize)
    return torch.equal(wide.to(narrow.dtype), narrow)


def same_bytes(first: TensorRef, second: TensorRef) -> bool:
    """Return True when both hold the same dtype, shape and bytes; reads pieces of 16 MiB."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if isinstance(first, ComputedRef) or isinstance(second, ComputedRef):
        return all(
            torch.equal(read_bytes(first, start, stop), read_bytes(second, start, stop))
            for start in range(0, first.nbytes, COMPUTED_BYTES)
            for stop in (min(first.nbytes, start + COMPUTED_BYTES),)
        )
    with ExitStack() as stack:
        streams = []
        for ref in (first, second):
            with reading(ref.file):
                streams.append(stack.enter_context(ref.file.open("rb")))
                streams[-1].seek(ref.start)
        remaining = first.nbytes
        while remaining:
            size = min(remaining, 16 << 20)
            with reading(first.file):
                piece = streams[0].read(size)
            with reading(second.file):
                if piece != streams[1].read(size):
                    return False
            remaining -= size
    return True
