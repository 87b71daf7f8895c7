"""Merge of adapters into a base checkpoint: the job behind `adapter-merge merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
    is_stale_quantization,
    open_pair,
    parts_of,
    snapshot_of,
    training_warnings,
)
from adapter_merge.combine.plausibility import (
    sample_changes,
    warn_of_large_changes,
    warn_of_missing_layers,
    warn_of_nonfinite,
)
from adapter_merge.engine.devices import choose_devices
from adapter_merge.engine.execute import FinishedShard, Progress, execute
from adapter_merge.engine.plan import MergePlan, ShardPlan
from adapter_merge.errors import InputError, Problem, raise_all
from adapter_merge.files.links import can_link
from adapter_merge.outputs.leftovers import staging_folder
from adapter_merge.outputs.manifest import make_manifest, write_manifest
from adapter_merge.outputs.model_folder import base_files, output_files, planned_files, write_side_files
from adapter_merge.outputs.preimage import PreimageRecorder
from adapter_merge.outputs.resume_journal import MergePart, check_complete, publish_workplace, shards_of_part, workplace
from adapter_merge.outputs.staging import check_output, check_space, nearest_folder
from adapter_merge.verification.text_divergence import text_divergence

from .options import MergeOptions
from .plans import make_plan
from .ray_tasks import check_ray_options, kind_of_device, make_job, write_on_ray
from .results import MergeResult
from .write_as import SAME, certify, check_write_as

LOST_WARNING = 0.5  # share of a delta that rounding changes or removes, above which a warning is written


def merge(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    options: MergeOptions = MergeOptions(),
    *,
    progress: Progress | None = None,
) -> MergeResult:
    """Write the merged model to `output`: adapted weights are computed, all other tensors and files are copied.

    base: model folder or hub id; None where `adapter` is a DCFT reference checkpoint, which holds its base, or a Recipe
    that names one. adapter: a folder, file or hub id, or a Recipe of several adapters. progress: called with the number
    of bytes just written, from any thread.

    W' = diag(row_scale) (W0 + up @ down) diag(col_scale), with W0 (out, in), up (out, R) and down (R, in), is computed
    in float32 (float64 for float64 weights) and rounded once to the output's dtype. W0 of a quantised base is what the
    scheme's own library dequantises; `write_as` chooses how such weights are written.
    Raises InputError, AdapterError, MismatchError or UnsupportedError where the adapter cannot be applied to the base,
    OutputError where the output cannot be written, NumericsError for NaN or infinity, ParityError where requantised
    weights keep less than `min_retention`. No output is left behind then, except with `keep_partial` or `part`.

    Example:
        >>> result = merge("base", "adapter", "merged", MergeOptions(dtype="bfloat16"))
        >>> max(change.relative_delta for change in result.weights.values()) > 0
        True
    """
    output = Path(output)
    check_ray_options(options)
    bound = open_pair(base, adapter, options.base_kind, options.reading)
    inputs = snapshot_of(bound) if options.link != "hardlink" else snapshot_of(bound).without_link_times()
    _check_config(bound)
    check_output(output, options.overwrite, input_folders(bound))
    check_values(bound)
    check_write_as(bound.base, options)
    plan = make_plan(bound, options)
    _check_options(plan, options.hashes, options.keep_preimage, options.part, options.finish)
    shards = plan.shards if options.part is None else shards_of_part(plan.shards, options.part)
    if not options.finish:
        check_space(output, _space_needed(output, shards, options.link, options.keep_preimage))
    devices = choose_devices(options.device) if options.ray is None else []
    stated: dict[str, Any] = {
        "dtype": options.dtype,
        "device": str(devices[0]) if devices else kind_of_device(options),
        "link": options.link,
        "keep_preimage": options.keep_preimage,
    }
    if options.max_shard_bytes is not None:
        stated["max_shard_bytes"] = options.max_shard_bytes
    if options.write_as is not None:
        stated["as"] = options.write_as
    content = make_manifest(
        "merged model", describe_inputs(bound, options.reading), stated | describe_combination(bound)
    )
    content["warnings"] = [
        *_missing_config(bound),
        *(text for part in parts_of(bound) for text in warn_of_missing_layers(part)),
    ]
    if options.dry_run:
        content["warnings"] += [
            text for part in parts_of(bound) for text in warn_of_large_changes(sample_changes(part))
        ]
        return MergeResult(output, content | {"dry_run": True, "bytes": plan.nbytes, "planned": planned_files(plan)})
    for part in parts_of(bound):
        check_whole_base(part)
    identity = _resume_identity(plan, content)
    with workplace(
        output,
        options.overwrite,
        identity,
        plan,
        inputs.readers,
        part=options.part,
        finishing=options.finish,
        keep=options.keep_partial,
    ) as place:
        recorder = PreimageRecorder(place.folder) if options.keep_preimage else None

        def on_shard(shard: FinishedShard) -> None:
            inputs.check()  # before the journal records the shard as finished
            if recorder is not None:
                recorder.close(by_file[shard.file])
            place.record(shard)

        by_file = {shard.file: shard for shard in plan.shards}
        try:
            finished = place.check_finished(shards, recorder.files if recorder is not None else lambda _: [])
            if options.finish:
                if place.device != identity["device"]:
                    content["options"]["device"] = place.device
                check_complete(plan.shards, finished, output)
            elif options.ray is not None:
                job = make_job(bound, base, adapter, options, place.folder)
                unfinished = [shard for shard in shards if shard.file not in finished]
                finished |= write_on_ray(job, unfinished, progress, on_shard)
            else:
                finished |= execute(
                    plan,
                    place.folder,
                    devices,
                    options.workers,
                    progress,
                    shards=[shard for shard in shards if shard.file not in finished],
                    hashing=options.hashes,
                    link=options.link,
                    vram=options.vram,
                    on_shard=on_shard,
                    recorder=recorder,
                )
        finally:
            if recorder is not None:
                recorder.abandon()
        content["layers"] = {
            name: {key: value for key, value in asdict(change).items() if value is not None}
            for shard in finished.values()
            for name, change in sorted(shard.figures.items())
        }
        if options.write_as == SAME and options.part is None:
            content["certificate"] = certify(content["layers"], options.min_retention)
        content["warnings"] += training_warnings(bound, options.reading)
        content["warnings"] += warn_of_large_changes(
            {name: figures["relative_delta"] for name, figures in content["layers"].items()}
        )
        content["warnings"] += warn_of_nonfinite(name for shard in finished.values() for name in shard.not_finite)
        content["warnings"] += [] if options.write_as == SAME else _rounding_warnings(content["layers"])
        if options.part is not None:
            done = {name: shard.sha256 for name, shard in sorted(finished.items())}
            return MergeResult(output, content | {"part": f"{options.part[0]}/{options.part[1]}", "files": done})
        write_side_files(plan, place.folder, content, output.name, options.keep_preimage)
        if options.texts is not None:
            content["certificate"]["texts"] = asdict(text_divergence(bound, place.folder, options.texts))
        if options.hashes:
            content["base"]["files"] = base_files(plan, finished)
            content["files"] = output_files(place.folder, finished)
        inputs.check()
        write_manifest(place.folder, content)
        publish_workplace(place, output, options.overwrite)
    return MergeResult(output, content)


def _check_config(bound: BoundAdapter) -> None:
    """Raise InputError where the config states a quantisation that the weights do not have."""
    if is_stale_quantization(bound.base):
        raise InputError(
            f"{bound.base.folder / 'config.json'}: has a quantization_config, but all weights are plain floats",
            expected="a config that matches the weights: loaders would look for quantised weights",
            hint="remove quantization_config from config.json if the base is not quantised",
        )


def _missing_config(bound: BoundAdapter) -> list[str]:
    """Return a warning where the merged model will lack config.json because the base has none."""
    if (bound.base.folder / "config.json").is_file():
        return []
    return [
        f"{bound.base.folder} has no config.json, so the merged model has none either: no library can load it before "
        "you add the config.json of the base's architecture"
    ]


def _space_needed(output: Path, shards: Sequence[ShardPlan], link: str, keep_preimage: bool) -> int:
    """Return the bytes still to be written, less those of a killed run, whose files are reused or removed."""
    folder = nearest_folder(output)
    planned = sum(
        shard.nbytes
        for shard in shards
        if not (shard.is_copy and shard.source is not None and can_link(shard.source, folder, link))
    )
    left_by_killed_run = sum(
        file.stat().st_blocks * 512 for file in staging_folder(output).rglob("*") if file.is_file()
    )
    return planned * (2 if keep_preimage else 1) - left_by_killed_run


def _check_options(plan: MergePlan, hashes: bool, keep_preimage: bool, part: MergePart | None, finish: bool) -> None:
    problems = []
    if part is not None and finish:
        problems.append(
            Problem("--shards and --finish exclude each other", hint="use --finish after every part was written")
        )
    if not hashes and (part is not None or finish):
        problems.append(Problem("the parts of a merge are checked by their hashes", hint="leave --no-hashes out"))
    if not hashes and keep_preimage:
        problems.append(Problem("a pre-image is checked by hashes", hint="leave --no-hashes out"))
    if keep_preimage and any(shard.source is None for shard in plan.shards):
        problems.append(
            Problem(
                "a pre-image can restore plain safetensors files only",
                got="a base of pickled or quantised weights",
                hint="keep the base, or leave --keep-preimage out",
            )
        )
    raise_all(problems, InputError)


def _resume_identity(plan: MergePlan, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal for a resumed merge to reuse a finished shard; its hash is checked separately."""
    return {
        "operation": plan.operation,
        "base": content["base"]["fingerprint"],
        "adapters": [[entry["sha256"], entry["base_kind"], entry["stated"]] for entry in content["adapters"]],
        "options": {key: value for key, value in content["options"].items() if key not in ("device", "link")},
        "device": content["options"]["device"].split(":")[0],
        "versions": content["versions"],
        "shards": {shard.file: shard.identity for shard in plan.shards},
    }


def _rounding_warnings(layers: Mapping[str, Mapping[str, float]]) -> list[str]:
    worst = {name: max(figures["rounding"], figures["lost"]) for name, figures in layers.items()}
    affected = sorted((name for name in worst if worst[name] > LOST_WARNING), key=lambda name: -worst[name])
    if not affected:
        return []
    lost = max(figures["lost"] for figures in layers.values())
    return [
        f"the error of rounding to the output dtype is above {LOST_WARNING:.0%} of the delta in {len(affected)} of "
        f"{len(layers)} weights (worst: {affected[0]}); up to {lost:.0%} of a delta is lost in values that rounding "
        "leaves at the base's: use --dtype float32, or keep the adapter as factors"
    ]
