"""Merge and materialise: the whole jobs behind `adapter-merge merge` and `adapter-merge delta`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.open_inputs import (
    AdapterInput,
    check_values,
    describe_inputs,
    input_folders,
    is_stale_quantization,
    open_pair,
    snapshot_of,
)
from adapter_merge.engine.devices import choose_device
from adapter_merge.engine.execute import FinishedShard, Progress, execute
from adapter_merge.engine.plan import MergePlan, ShardPlan, plan_delta, plan_merge
from adapter_merge.errors import InputError, Problem, raise_all
from adapter_merge.formats.detection import ReadOptions
from adapter_merge.outputs.model_folder import base_files, output_files, write_rest
from adapter_merge.outputs.preimage import PreimageRecorder
from adapter_merge.outputs.resume_journal import MergePart, check_complete, shards_of_part, workplace
from adapter_merge.outputs.resume_journal import finish as publish_place
from adapter_merge.outputs.staging import (
    check_output,
    check_space,
    manifest,
    nearest_folder,
    staged,
    staging_folder,
    write_manifest,
)
from adapter_merge.storage.links import can_link

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LOST_WARNING = 0.5


def merge(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    link: str = "auto",
    hashes: bool = True,
    keep_preimage: bool = False,
    keep_partial: bool = False,
    part: MergePart | None = None,
    finish: bool = False,
    vram: int | None = None,
) -> dict[str, Any]:
    """Write the merged model to `output` and return its manifest.

    base: model folder or hub id; None when `adapter` is a DCFT reference checkpoint, which holds its base, or a recipe
    that names it. adapter: a folder, file or hub id, or a Recipe (recipe.py) of several, with options of its own.
    dtype: float32, float16 or bfloat16 for all float tensors of the output; None keeps each tensor's own.
    base_kind: original or residual (PiSSA and DuDe); None decides by evidence.
    progress: called with the bytes just written, from any thread.
    link: how shards that no adapter touches get into the output: auto, reflink, hardlink or copy (links.py).
    hashes: sha256 of every input and output file in the manifest; without them there is no verify, restore or resume.
    keep_preimage: keep what is overwritten, so that `restore` needs no base (preimage.py).
    keep_partial: leave the finished shards when this run fails, for the next one to go on; a killed run always does.
    part: make only the i-th of n shares of the shards; returns an account of them, and the output is not there yet.
    finish: check that all parts are there and write the rest: side files, index and manifest, then the output's name.
    vram: bytes of tensors on each CUDA device; its context, and what the allocator rounds up, come on top.
    Raises AdapterMergeError (see errors.py); nothing is left behind then but what keep_partial or a part keeps.
    """
    output = Path(output)
    bound = open_pair(base, adapter, base_kind, options)
    inputs = snapshot_of(bound) if link != "hardlink" else snapshot_of(bound).without_link_times()
    _check_config(bound)
    check_output(output, overwrite, input_folders(bound))
    check_values(bound)
    plan = plan_merge(bound.base, (bound,), DTYPES[dtype] if dtype else None)
    _check_options(plan, hashes, keep_preimage, part, finish)
    shards = plan.shards if part is None else shards_of_part(plan.shards, part)
    if not finish:
        check_space(output, _space_needed(output, shards, link, keep_preimage))
    devices = choose_devices(device)
    stated = {"dtype": dtype, "device": str(devices[0]), "link": link, "keep_preimage": keep_preimage}
    content = manifest("merged model", describe_inputs(bound, options), stated | combination_of(bound))
    if dry_run:
        return content | {"dry_run": True, "bytes": plan.nbytes}
    identity = _identity(plan, content)
    with workplace(output, overwrite, identity, plan, part=part, finishing=finish, keep=keep_partial) as place:
        recorder = PreimageRecorder(place.folder) if keep_preimage else None

        def on_shard(shard: FinishedShard) -> None:
            inputs.check()  # before the journal says that it can be taken over
            if recorder is not None:
                recorder.close(by_file[shard.file])
            place.record(shard)

        by_file = {shard.file: shard for shard in plan.shards}
        try:
            finished = place.proved(shards, recorder.files if recorder is not None else lambda _: [])
            if finish:
                if place.device != identity["device"]:
                    content["options"]["device"] = place.device
                check_complete(plan.shards, finished, output)
            else:
                finished |= execute(
                    plan,
                    place.folder,
                    devices,
                    workers,
                    progress,
                    shards=[shard for shard in shards if shard.file not in finished],
                    hashing=hashes,
                    link=link,
                    vram=vram,
                    on_shard=on_shard,
                    recorder=recorder,
                )
        finally:
            if recorder is not None:
                recorder.abandon()
        content["layers"] = {
            name: asdict(found) for shard in finished.values() for name, found in sorted(shard.figures.items())
        }
        content["warnings"] = _rounding_warnings(content["layers"])
        if part is not None:
            done = {name: shard.sha256 for name, shard in sorted(finished.items())}
            return content | {"part": f"{part[0]}/{part[1]}", "files": done}
        write_rest(plan, place.folder, content, output.name, keep_preimage)
        if hashes:
            content["base"]["files"] = base_files(plan, finished)
            content["files"] = output_files(place.folder, finished)
        inputs.check()
        write_manifest(place.folder, content)
        publish_place(place, output, overwrite)
    return content


def delta(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    hashes: bool = True,
    vram: int | None = None,
) -> dict[str, Any]:
    """Write dW = W' - W0 of every adapted weight to `output`/delta.safetensors, float32 unless `dtype` is given.

    The base's fingerprint stands in the manifest, not its files' hashes: most of them are not read.
    """
    output = Path(output)
    bound = open_pair(base, adapter, base_kind, options)
    inputs = snapshot_of(bound)
    check_output(output, overwrite, input_folders(bound))
    check_values(bound)
    plan = plan_delta(bound, DTYPES[dtype or "float32"])
    check_space(output, plan.nbytes)
    devices = choose_devices(device)
    stated = {"dtype": dtype or "float32", "device": str(devices[0])}
    content = manifest("deltas", describe_inputs(bound, options), stated | combination_of(bound))
    content["not_included"] = sorted(bound.replacements)
    content["base_changes"] = _base_changes(bound)
    if dry_run:
        return content | {"dry_run": True, "bytes": plan.nbytes}
    with staged(output, overwrite, inputs) as folder:
        finished = execute(plan, folder, devices, workers, progress, hashing=hashes, vram=vram)
        if hashes:
            content["files"] = output_files(folder, finished)
        write_manifest(folder, content)
    return content


def _base_changes(bound: BoundAdapter) -> dict[str, Any]:
    """What must be changed in the base before the deltas are added: config keys, and tensors copied under new names."""
    new = {item.name: item.weight.name for item in bound.modules if item.name not in bound.base.tensors}
    copies = {**new, **{name: ref.name for name, ref in bound.copies.items()}}
    return {"config": dict(bound.config_changes), "copies": dict(sorted(copies.items()))}


def combination_of(bound: BoundAdapter) -> dict[str, Any]:
    """The manifest's option that says how several adapters went together; none for one."""
    return {"combination": bound.recipe.as_json()} if isinstance(bound, CombinedBound) else {}


def _check_config(bound: BoundAdapter) -> None:
    """Raise InputError where the merged model would carry a config that its weights belie."""
    if is_stale_quantization(bound.base):
        raise InputError(
            f"{bound.base.folder / 'config.json'}: has a quantization_config, but all weights are plain floats",
            expected="a config that its weights bear out: loaders would look for quantised weights",
            hint="remove quantization_config from config.json if the base is not quantised",
        )


def _space_needed(output: Path, shards: Sequence[ShardPlan], link: str, keep_preimage: bool) -> int:
    """Bytes still to be written, less what a killed run has left, which is used or removed."""
    folder = nearest_folder(output)
    wanted = sum(
        shard.nbytes
        for shard in shards
        if not (shard.is_copy and shard.source is not None and can_link(shard.source, folder, link))
    )
    left = sum(file.stat().st_blocks * 512 for file in staging_folder(output).rglob("*") if file.is_file())
    return wanted * (2 if keep_preimage else 1) - left


def _check_options(plan: MergePlan, hashes: bool, keep_preimage: bool, part: MergePart | None, finish: bool) -> None:
    problems = []
    if part is not None and finish:
        problems.append(Problem("--shards and --finish exclude each other", hint="finish once all parts are made"))
    if not hashes and (part is not None or finish):
        problems.append(Problem("parts of a merge are put together by their hashes", hint="leave --no-hashes out"))
    if not hashes and keep_preimage:
        problems.append(Problem("a pre-image is proved by hashes", hint="leave --no-hashes out"))
    if keep_preimage and any(shard.source is None for shard in plan.shards):
        problems.append(
            Problem(
                "a pre-image gives the base's files back, and only safetensors files can be put together again",
                got="a base of pickled weights",
                hint="keep the base, or leave --keep-preimage out",
            )
        )
    raise_all(problems, InputError)


def _identity(plan: MergePlan, content: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a finished shard to be taken over. The shards' own hashes are proved beside it."""
    return {
        "operation": plan.operation,
        "base": content["base"]["fingerprint"],
        "adapters": [[entry["sha256"], entry["base_kind"], entry["stated"]] for entry in content["adapters"]],
        "options": {key: value for key, value in content["options"].items() if key not in ("device", "link")},
        "device": content["options"]["device"].split(":")[0],
        "versions": content["versions"],
        "shards": {shard.file: shard.identity for shard in plan.shards},
    }


def choose_devices(name: str) -> list[torch.device]:
    """The devices of a merge: all CUDA devices for "cuda" (and "auto" where there is one), else the one named."""
    device = choose_device(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def _rounding_warnings(layers: Mapping[str, Mapping[str, float]]) -> list[str]:
    worst = {name: max(figures["rounding"], figures["lost"]) for name, figures in layers.items()}
    bad = sorted((name for name in worst if worst[name] > LOST_WARNING), key=lambda name: -worst[name])
    if not bad:
        return []
    lost = max(figures["lost"] for figures in layers.values())
    return [
        f"rounding to the output dtype weighs more than {LOST_WARNING:.0%} of the delta in {len(bad)} of {len(layers)} "
        f"weights (worst: {bad[0]}); up to {lost:.0%} of a delta is lost in values that stay the base's: "
        "write --dtype float32, or keep the adapter as factors"
    ]
