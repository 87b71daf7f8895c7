"""Merge and materialise: the whole jobs behind `adapter-merge merge` and `adapter-merge delta`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapter import Adapter
from .binding import BoundAdapter, bind
from .cards import merged_card
from .checkpoint import CANDIDATES, open_checkpoint
from .devices import choose_device
from .engine import FinishedShard, Progress, execute
from .errors import InputError, Problem, raise_all
from .formats import ReadOptions, open_adapter
from .hashing import hash_files
from .journal import Part, check_complete, shards_of_part, workplace
from .journal import finish as publish_place
from .output import (
    MANIFEST,
    check_output,
    check_space,
    copy_synced,
    manifest,
    remove,
    staged,
    staging_folder,
    write_json,
    write_text,
)
from .plan import INDEX, MergePlan, ShardPlan, plan_delta, plan_merge
from .preimage import FOLDER, SIDE, PreimageRecorder

if TYPE_CHECKING:
    from .combining import Combination

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LOST_WARNING = 0.5


def open_pair(
    base: str | Path | None,
    adapter: str | Path,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> BoundAdapter:
    """`adapter` bound to `base`; without a base, a checkpoint that holds its own (DCFT reference)."""
    checkpoint = open_checkpoint(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    if checkpoint is None:
        checkpoint = opened.own_base
        if checkpoint is None:
            raise InputError(
                f"{adapter}: is an adapter alone",
                expected="BASE and ADAPTER",
                hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
            )
    return bind(opened, checkpoint, base_kind)


def adapter_sha256(adapter: Adapter) -> str:
    """sha256 over the adapter's files, in the order of their names."""
    return _combined(adapter_files(adapter))


def adapter_files(adapter: Adapter) -> dict[str, str]:
    """sha256 of each of the adapter's files, by its path in the adapter's folder."""
    return {_relative(file, adapter.folder): sha for file, sha in hash_files(sorted(adapter.files)).items()}


def _combined(files: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, sha in sorted(files.items(), key=lambda item: Path(item[0]).name):
        digest.update(f"{Path(name).name}\0{sha}\0".encode())
    return digest.hexdigest()


def _relative(file: Path, folder: Path) -> str:
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return file.name


def describe_inputs(adapters: tuple[BoundAdapter, ...]) -> dict[str, Any]:
    """The manifest's account of base and adapters."""
    base = adapters[0].base
    return {
        "base": {
            "name": base.config.get("_name_or_path") or adapters[0].adapter.base_name or base.folder.name,
            "path": str(base.folder),
            "fingerprint": base.fingerprint,
        },
        "adapters": [
            {
                "name": bound.adapter.folder.resolve().name,
                "path": str(bound.adapter.folder),
                "format": bound.adapter.format,
                "method": bound.adapter.method,
                "modules": len(bound.modules),
                "replacements": sorted(bound.replacements),
                "base_kind": bound.base_kind,
                "evidence": bound.evidence,
                "notes": list(bound.adapter.notes),
                "sha256": _combined(files),
                "files": files,
            }
            for bound, files in ((bound, adapter_files(bound.adapter)) for bound in adapters)
        ],
    }


def merge(
    base: str | Path | None,
    adapter: str | Path,
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
    part: Part | None = None,
    finish: bool = False,
    vram: int | None = None,
) -> dict[str, Any]:
    """Write the merged model to `output` and return its manifest.

    base: model folder or hub id; None when `adapter` is a DCFT reference checkpoint, which holds its base.
    dtype: float32, float16 or bfloat16 for all float tensors of the output; None keeps each tensor's own.
    base_kind: original or residual (PiSSA and DuDe); None decides by evidence.
    progress: called with the bytes just written, from any thread.
    link: how shards that no adapter touches get into the output: auto, reflink, hardlink or copy (links.py).
    hashes: sha256 of every input and output file in the manifest; without them there is no verify, restore or resume.
    keep_preimage: keep what is overwritten, so that `restore` needs no base (preimage.py).
    keep_partial: leave the finished shards when this run fails, for the next one to go on; a killed run always does.
    part: make only the i-th of n shares of the shards; returns an account of them, and the output is not there yet.
    finish: check that all parts are there and write the rest: side files, index and manifest, then the output's name.
    vram: bytes of device memory to use on each CUDA device.
    Raises AdapterMergeError (see errors.py); nothing is left behind then but what keep_partial or a part keeps.
    """
    return merge_bound(
        (open_pair(base, adapter, base_kind, options),),
        output,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        dry_run=dry_run,
        workers=workers,
        progress=progress,
        link=link,
        hashes=hashes,
        keep_preimage=keep_preimage,
        keep_partial=keep_partial,
        part=part,
        finish=finish,
        vram=vram,
    )


def merge_bound(
    adapters: tuple[BoundAdapter, ...],
    output: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    link: str = "auto",
    hashes: bool = True,
    keep_preimage: bool = False,
    keep_partial: bool = False,
    part: Part | None = None,
    finish: bool = False,
    vram: int | None = None,
    combination: Combination | None = None,
) -> dict[str, Any]:
    """`merge` for adapters that are bound to one base already; as `combination` says where there is one."""
    output = Path(output)
    check_output(output, overwrite, (adapters[0].base.folder, *(bound.adapter.folder for bound in adapters)))
    for bound in adapters:
        bound.adapter.check_values()
    planned = adapters if combination is None else combination.planned()
    plan = plan_merge(adapters[0].base, planned, DTYPES[dtype] if dtype else None)
    _check_options(plan, hashes, keep_preimage, part, finish)
    shards = plan.shards if part is None else shards_of_part(plan.shards, part)
    if not finish:
        check_space(output, _space_needed(output, shards, link, keep_preimage))
    devices = choose_devices(device)
    content = manifest(
        "merged model",
        describe_inputs(adapters),
        {"dtype": dtype, "device": str(devices[0]), "link": link, "keep_preimage": keep_preimage}
        | ({} if combination is None else {"combination": combination.recipe.as_json()}),
    )
    if dry_run:
        return content | {"dry_run": True, "bytes": plan.nbytes}
    with workplace(output, overwrite, _identity(plan, content), part, keep_partial or finish) as place:
        recorder = PreimageRecorder(place.folder) if keep_preimage else None

        def on_shard(shard: FinishedShard) -> None:
            if recorder is not None:
                recorder.close(by_file[shard.file])
            place.record(shard)

        by_file = {shard.file: shard for shard in plan.shards}
        try:
            finished = place.proved(shards, recorder.files if recorder is not None else lambda _: []) if hashes else {}
            if finish:
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
        _write_rest(plan, place.folder, content, output.name, keep_preimage)
        if hashes:
            content["base"]["files"] = _base_files(plan, finished)
            content["files"] = _output_files(place.folder, finished)
        write_json(place.folder / MANIFEST, content)
        publish_place(place, output)
    return content


def _space_needed(output: Path, shards: Sequence[ShardPlan], link: str, keep_preimage: bool) -> int:
    """Bytes still to be written, less what a killed run has left, which is used or removed."""
    wanted = sum(shard.nbytes for shard in shards if not (link == "hardlink" and shard.is_copy))
    left = sum(file.stat().st_blocks * 512 for file in staging_folder(output).rglob("*") if file.is_file())
    return wanted * (2 if keep_preimage else 1) - left


def _check_options(plan: MergePlan, hashes: bool, keep_preimage: bool, part: Part | None, finish: bool) -> None:
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
        "adapters": [[entry["sha256"], entry["base_kind"]] for entry in content["adapters"]],
        "options": {key: value for key, value in content["options"].items() if key not in ("device", "link")},
        "device": content["options"]["device"].split(":")[0],
        "versions": content["versions"],
        "shards": {shard.file: shard.identity for shard in plan.shards},
    }


def _write_rest(plan: MergePlan, folder: Path, content: Mapping[str, Any], title: str, keep_preimage: bool) -> None:
    """Everything beside the weights; a finish that was killed here begins again."""
    for path in folder.iterdir():
        if path.name != FOLDER and path.name not in {shard.file for shard in plan.shards}:
            remove(path)
    _copy_side_files(plan, folder)
    if plan.config is not None:
        write_text(folder / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
    index = plan.index()
    if index is not None:
        write_json(folder / INDEX, index)
    write_text(folder / "README.md", merged_card(content, title, plan.config or plan.base.config))
    if keep_preimage:
        side = folder / FOLDER / SIDE
        remove(side)
        side.mkdir()
        for relative in _base_side(plan):
            if relative in plan.side_files and relative not in _replaced(plan):
                continue
            (side / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_synced(plan.base.folder / relative, side / relative)


def _replaced(plan: MergePlan) -> set[Path]:
    """Side files of the base that the output holds in another form."""
    own = {Path("README.md"), Path(MANIFEST)}
    return own | {Path("config.json")} if plan.config is not None else own


def _base_side(plan: MergePlan) -> list[Path]:
    """The base's files beside its weights, its index among them, as they are recorded and restored."""
    first = next((name for name in CANDIDATES if (plan.base.folder / name).is_file()), "")
    return [*_carried(plan), *([Path(first)] if first.endswith(".index.json") else [])]


def _carried(plan: MergePlan) -> list[Path]:
    """The base's side files; not what another merge kept of its own base."""
    return [path for path in plan.side_files if path.parts[0] != FOLDER]


def _base_files(plan: MergePlan, finished: Mapping[str, FinishedShard]) -> dict[str, str]:
    """sha256 of the base's files: weights as they were read, the rest hashed now."""
    known = {
        shard.source.name: sha
        for shard in plan.shards
        if shard.source is not None and (sha := finished[shard.file].source_sha256) is not None
    }
    folder = plan.base.folder
    weights = [shard.file for shard in plan.base.shards if shard.file.name not in known]
    found = hash_files([*weights, *(folder / relative for relative in _base_side(plan))])
    return dict(sorted((known | {_relative(path, folder): sha for path, sha in found.items()}).items()))


def _output_files(folder: Path, finished: Mapping[str, FinishedShard]) -> dict[str, str]:
    """sha256 of the output's files: weights as they were written, the rest hashed now."""
    known = {name: shard.sha256 for name, shard in finished.items() if shard.sha256 is not None}
    rest = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() not in known]
    found = {path.relative_to(folder).as_posix(): sha for path, sha in hash_files(rest).items()}
    return dict(sorted((known | found).items()))


def delta(
    base: str | Path | None,
    adapter: str | Path,
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
    check_output(output, overwrite, (bound.base.folder, bound.adapter.folder))
    bound.adapter.check_values()
    plan = plan_delta(bound, DTYPES[dtype or "float32"])
    check_space(output, plan.nbytes)
    devices = choose_devices(device)
    content = manifest("deltas", describe_inputs((bound,)), {"dtype": dtype or "float32", "device": str(devices[0])})
    content["not_included"] = sorted(bound.replacements)
    if dry_run:
        return content | {"dry_run": True, "bytes": plan.nbytes}
    with staged(output, overwrite) as folder:
        finished = execute(plan, folder, devices, workers, progress, hashing=hashes, vram=vram)
        if hashes:
            content["files"] = _output_files(folder, finished)
        write_json(folder / MANIFEST, content)
    return content


def choose_devices(name: str) -> list[torch.device]:
    """The devices of a merge: all CUDA devices for "cuda" (and "auto" where there is one), else the one named."""
    device = choose_device(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    for relative in _carried(plan):
        if relative in _replaced(plan):
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_synced(plan.base.folder / relative, target)


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
