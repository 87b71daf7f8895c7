"""Plans of `merge` and `delta`: the same on every machine for the same inputs and options."""

from __future__ import annotations

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.engine.plan import MergePlan, plan_delta, plan_merge
from adapter_merge.engine.requantise import plan_requantised
from adapter_merge.errors import InputError
from adapter_merge.storage.tensor_io import SAFETENSORS_DTYPES as DTYPES

from .options import DeltaOptions, MergeOptions
from .write_as import SAME, computed_dtype


def make_plan(bound: BoundAdapter, options: MergeOptions | DeltaOptions) -> MergePlan:
    """Plan the merged model or the deltas, from headers. Raises InputError or UnsupportedError."""
    if isinstance(options, DeltaOptions):
        return plan_delta(bound, DTYPES[options.dtype])
    limit = options.max_shard_bytes
    if limit is not None and (limit < 1 or options.write_as == SAME or options.keep_preimage):
        raise InputError(
            f"the output cannot be split into files of at most {limit} bytes",
            expected="1 byte or more, and neither write_as same nor a pre-image, which need the base's files",
        )
    if options.write_as == SAME:
        return plan_requantised(bound)
    dtype = DTYPES[options.dtype] if options.dtype else None
    return plan_merge(bound.base, (bound,), dtype, computed_dtype(bound.base, options), max_shard_bytes=limit)
