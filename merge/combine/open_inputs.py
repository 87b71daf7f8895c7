"""Opening and binding of a job's inputs (base and adapter, or a recipe), and their description for the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.binding.trained_base import evidence_of_training, is_unstated_4bit, open_trained_base
from adapter_merge.errors import InputError
from adapter_merge.files.hashing import hash_files
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.methods.adapter import Adapter
from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

from .adapter_hashes import combined_sha256, hash_adapter_files, hashes_of_merged_adapters, hashes_of_origins
from .combined_adapter import CombinedBound, open_combination
from .origin import bind_checked
from .recipe import Recipe

AdapterInput = str | Path | Recipe  # a folder, a file or a hub id; or a recipe of several adapters


def open_pair(
    base: str | Path | None,
    adapter: AdapterInput,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> BoundAdapter:
    """Open and bind `adapter` to `base`, or to the recipe's base, or to the adapter's own (DCFT checkpoint).

    `base_kind` and `options` apply to a single adapter; a recipe states them per adapter. Raises AdapterMergeError.
    """
    if isinstance(adapter, Recipe):
        return open_combination(adapter, base)
    trained_on = options.trained_on if options is not None else None
    checkpoint = open_trained_base(base, trained_on) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    if checkpoint is None:
        checkpoint = opened.own_base
        if checkpoint is None:
            raise InputError(
                f"{adapter}: is an adapter, and no base is given",
                expected="BASE and ADAPTER",
                hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
            )
    return bind_checked(opened, checkpoint, base_kind)


def parts_of(bound: BoundAdapter) -> tuple[BoundAdapter, ...]:
    """Return the bound adapters that `bound` is made of: itself, or those of a combination."""
    return bound.parts if isinstance(bound, CombinedBound) else (bound,)


def input_folders(bound: BoundAdapter) -> tuple[Path, ...]:
    """Return every folder that is read."""
    return (bound.base.folder, *(part.adapter.folder for part in parts_of(bound)))


def snapshot_of(bound: BoundAdapter) -> InputSnapshot:
    """Return the state of all input files before they were first read."""
    snapshot = bound.base.snapshot
    for part in parts_of(bound):
        snapshot += part.adapter.snapshot
    return snapshot


def check_values(bound: BoundAdapter) -> None:
    """Read every tensor of every adapter once. Raises NumericsError with each that holds NaN or infinity."""
    for part in parts_of(bound):
        part.adapter.check_values()


def describe_inputs(bound: BoundAdapter, options: ReadOptions | None = None) -> dict[str, Any]:
    """Describe base and adapters for the manifest, with every stated option, so that they can be opened again."""
    base = bound.base
    content: dict[str, Any] = {
        "base": {
            **_describe_base(base, parts_of(bound)[0].adapter),
            "fingerprint": base.fingerprint,
            "layout": base.layout,
        }
    }
    if not isinstance(bound, CombinedBound):
        return content | {"adapters": [_describe_bound(bound, stated_options(options))]}
    content["adapters"] = [
        _describe_bound(part, stated_options(ReadOptions(**(item.options or {})))) | {"name": item.name}
        for item, part in zip(bound.recipe.ingredients, bound.parts, strict=True)
    ]
    return content | ({"notes": list(bound.recipe.notes)} if bound.recipe.notes else {})


def _describe_base(base: Checkpoint, adapter: Adapter) -> dict[str, Any]:
    """Return the base's name, path, and number of weights of each quantisation scheme."""
    name = base.config.get("_name_or_path") or adapter.base_name or base.folder.name
    schemes = Counter(weight.scheme for weight in packed_weights(base).values())
    described: dict[str, Any] = {"name": name, "path": str((base.stored or base).folder)}
    if schemes:
        described["quantised"] = dict(schemes)
    merged = hashes_of_merged_adapters((base.stored or base).folder)
    if merged:
        described["merged"] = sorted(merged)
    return described | ({"notes": list(base.notes)} if base.notes else {})


def _describe_bound(bound: BoundAdapter, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's entry of one bound adapter."""
    return {
        **_describe_adapter(bound.adapter),
        "modules": len(bound.modules),
        "replacements": sorted(bound.replacements),
        "base_kind": bound.base_kind,
        "evidence": bound.evidence,
        "trained_on": evidence_of_training(bound.adapter, bound.base, stated.get("trained_on")),
        "origin": bound.origin.text,
        "contradictions": [problem.cause for problem in bound.origin.contradictions],
        "stated": stated,
        **_describe_files(bound.adapter),
    }


def _describe_files(adapter: Adapter) -> dict[str, Any]:
    """Return the hashes of an adapter, of its files, and of what it was made from."""
    files, origins = hash_adapter_files(adapter), hashes_of_origins(adapter.folder)
    described: dict[str, Any] = {"sha256": combined_sha256(files), "files": files}
    return described | ({"made_from": sorted(origins)} if origins else {})


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return the adapter's name, path, format, method, modules and notes, for its entry in the manifest."""
    return {
        "name": adapter.folder.resolve().name,
        "path": str(adapter.folder),
        "format": adapter.format,
        "method": str(adapter.method),
        "modules": len(adapter.modules),
        "replacements": sorted(adapter.replacements),
        "notes": list(adapter.notes),
    }


def describe_adapter_alone(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter without a base for the manifest."""
    causes = [problem.cause for problem in adapter.contradictions]
    entry = {**_describe_adapter(adapter), "contradictions": causes, **_describe_files(adapter)}
    return {"base": {"name": adapter.base_name, "fingerprint": None}, "adapters": [entry]}


def stated_options(options: ReadOptions | None) -> dict[str, Any]:
    """Return the options stated for an adapter as JSON values; a named file is followed by its sha256."""
    stated: dict[str, Any] = {}
    for key, value in asdict(options or ReadOptions()).items():
        if value is None:
            continue
        stated[key] = str(value) if isinstance(value, Path) else value
        if isinstance(value, Path):
            files = sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
            stated[f"{key}_sha256"] = combined_sha256({path.name: sha for path, sha in hash_files(files).items()})
    return stated


def training_warnings(bound: BoundAdapter, options: ReadOptions | None) -> list[str]:
    """Return a warning for each adapter whose config names a 4-bit base while the given base is not quantised."""
    stated = options.trained_on if options is not None else None
    if isinstance(bound, CombinedBound):
        stated = (bound.recipe.ingredients[0].options or {}).get("trained_on")
    return [
        f"{part.adapter.folder}: names {part.adapter.base_name} as its base, and is applied to unquantised weights: "
        "--trained-on nf4-double uses the quantised weights of the training, --trained-on original confirms these"
        for part in parts_of(bound)
        if is_unstated_4bit(part.adapter, bound.base, stated)
    ]


def is_stale_quantization(base: Checkpoint) -> bool:
    """Return True where the config states a quantisation but all weights are floats: loaders would trust the config."""
    if not base.config.get("quantization_config"):
        return False
    return all(ref.dtype in FLOAT_DTYPES for ref in base.tensors.values() if len(ref.shape) > 1)


def describe_combination(bound: BoundAdapter) -> dict[str, Any]:
    """Return the manifest's option "combination" for a combination of adapters; an empty dict for a single adapter."""
    return {"combination": bound.recipe.as_json()} if isinstance(bound, CombinedBound) else {}
