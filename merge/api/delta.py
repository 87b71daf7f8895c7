"""Computation of dense deltas: the job behind `adapter-merge delta`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.base_weights import check_whole_base
from adapter_merge.combine.open_inputs import (
    AdapterInput,
    check_values,
    describe_combination,
    describe_inputs,
    input_folders,
    open_pair,
    parts_of,
    snapshot_of,
)
from adapter_merge.engine.devices import choose_devices
from adapter_merge.engine.execute import FinishedShard, Progress, execute
from adapter_merge.engine.pieces import divide, join
from adapter_merge.outputs.manifest import make_manifest, write_manifest
from adapter_merge.outputs.model_folder import output_files
from adapter_merge.outputs.staging import check_output, check_space, staged

from .options import DeltaOptions
from .plans import make_plan
from .ray_tasks import check_ray_options, kind_of_device, make_job, write_on_ray
from .results import DeltaResult

PIECE_BYTES = 1 << 30  # of deltas that one task of a Ray cluster writes


def delta(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    options: DeltaOptions = DeltaOptions(),
    *,
    progress: Progress | None = None,
) -> DeltaResult:
    """Write the delta dW = W' - W0 of every adapted weight to `output`/delta.safetensors.

    A delta has the weight's name and the shape that the base stores: (out, in), or (in, out) for Conv1D. It is computed
    in float32 (float64 for float64 weights) and rounded once to `options.dtype`.
    base, adapter, progress: as for `merge`.
    Raises InputError, AdapterError, MismatchError or UnsupportedError where the adapter cannot be applied to the base,
    OutputError where the output cannot be written, NumericsError for NaN or infinity; no output is left behind then.

    Example:
        >>> delta("base", "adapter", "deltas").not_included
        ()
    """
    output = Path(output)
    check_ray_options(options)
    bound = open_pair(base, adapter, options.base_kind, options.reading)
    inputs = snapshot_of(bound)
    check_output(output, options.overwrite, input_folders(bound))
    check_values(bound)
    plan = make_plan(bound, options)
    check_space(output, plan.nbytes)
    devices = choose_devices(options.device) if options.ray is None else []
    stated = {"dtype": options.dtype, "device": str(devices[0]) if devices else kind_of_device(options)}
    content = make_manifest("deltas", describe_inputs(bound, options.reading), stated | describe_combination(bound))
    content["not_included"] = sorted(bound.replacements)
    content["base_changes"] = _base_changes(bound)
    if options.dry_run:
        return DeltaResult(output, content | {"dry_run": True, "bytes": plan.nbytes})
    for part in parts_of(bound):
        check_whole_base(part)
    with staged(output, options.overwrite, inputs) as folder:
        if options.ray is not None:
            job = replace(make_job(bound, base, adapter, options, folder), piece_bytes=PIECE_BYTES)
            (whole,) = plan.shards
            pieces = divide(whole, PIECE_BYTES)
            write_on_ray(job, pieces, progress)
            finished = {whole.file: FinishedShard(whole.file, join(folder, whole, pieces), None, {})}
        else:
            finished = execute(
                plan, folder, devices, options.workers, progress, hashing=options.hashes, vram=options.vram
            )
        if options.hashes:
            content["files"] = output_files(folder, finished)
        write_manifest(folder, content)
    return DeltaResult(output, content)


def _base_changes(bound: BoundAdapter) -> dict[str, Any]:
    """Return the config values and tensor copies that the base needs before the deltas are added."""
    new = {item.name: item.weight.name for item in bound.modules if item.name not in bound.base.tensors}
    copies = {**new, **{name: ref.name for name, ref in bound.copies.items()}}
    return {"config": dict(bound.config_changes), "copies": dict(sorted(copies.items()))}
