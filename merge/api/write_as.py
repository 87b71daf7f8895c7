"""How a quantised base is written again: the choice of `--as`, which only the user can make."""

from __future__ import annotations

from collections import Counter

from adapter_merge.errors import InputError
from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.tensor_io import SAFETENSORS_DTYPES as DTYPES

from .options import MergeOptions


def computed_dtype(base: Checkpoint, options: MergeOptions) -> str | None:
    """Return the safetensors dtype for the packed weights of `base`; None where it has none.

    Raises InputError where `options` do not choose one, or choose one for a base that is not quantised.
    """
    schemes = Counter(weight.scheme for weight in packed_weights(base).values())
    if not schemes:
        if options.write_as is not None:
            raise InputError(
                f"{base.folder}: --as {options.write_as} is for a quantised base, and this one has plain weights",
                hint="--dtype chooses the dtype of the output",
            )
        return None
    if options.write_as is None:
        raise InputError(
            f"{base.folder}: the base is quantised, and how to write merged weights is your choice",
            expected="--as bfloat16, float16 or float32: every weight dequantised, adapted and rounded once",
            got=", ".join(f"{count} weights of {scheme}" for scheme, count in schemes.most_common()),
            hint="the output is larger than the base by the ratio of the dtypes",
        )
    dtype = DTYPES[options.write_as]
    if options.dtype is not None and DTYPES[options.dtype] != dtype:
        raise InputError(
            f"--as {options.write_as} and --dtype {options.dtype} contradict each other",
            expected="one dtype: --as alone keeps the dtype of tensors that are not quantised",
        )
    return dtype
