"""Export of a model with adapters merged into it, or without adapters: no switching, and no cost at run time.

Adapters are merged before the builder reads the weights, in float32 arithmetic with one rounding, so an int4 export
quantises the merged weights. Several adapters are combined as by `adapter-merge merge`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.export.building.checks_before_build import Request, export_bytes, open_request
from adapter_merge.export.building.decoder import build_decoder
from adapter_merge.export.checking.parity import check_decoder_parity
from adapter_merge.export.engine.decoder_settings import decoder_settings
from adapter_merge.export.folder.contents import save_graph, write_manifest
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.decoder_inputs import prepare_graph
from adapter_merge.export.graph.insertion import stamp
from adapter_merge.outputs.staging import staged

if TYPE_CHECKING:
    import onnx_ir as ir

    from adapter_merge.combine.recipe import Recipe

DTYPES = {"fp32": "float32", "int4": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_merged(
    base: str | Path, adapters: Mapping[str, Path], output: Path, *, recipe: Recipe | None = None, **options: Any
) -> dict[str, Any]:
    """Write the export of `base` with `adapters` merged into it to `output`; return the report.

    recipe: how several adapters are combined; None: their sum. Other options: see request.open_request. Disk: the
    merged checkpoint is stored beside the output while the builder reads it.

    Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError before the build.
    """
    request = open_request(base, adapters, output, mode="merged", **options)
    checkpoint = request.checkpoint
    needed = export_bytes(checkpoint, request.precision) + (export_bytes(checkpoint, "fp32") if adapters else 0)
    request.reserve(needed)
    plan = request.plan({name: {"source": str(source)} for name, source in adapters.items()})
    if request.dry_run:
        if adapters:
            merged = output.with_name(f".{output.name}.merged")
            plan["adapters"] = merge_adapters(request, recipe, merged, dry_run=True)
        return {**plan, "dry_run": True, "bytes_needed": needed}
    with staged(output, request.overwrite, request.checkpoint.snapshot) as staging:
        manifest = request.manifest()
        weights = checkpoint.folder
        if adapters:
            weights = staging / "merged"
            plan["adapters"] = merge_adapters(request, recipe, weights)
            add_merged(manifest, plan["adapters"], recipe)
        merged_at = time.perf_counter()
        build_decoder(weights, staging, request.precision, request.device, source=checkpoint.folder)
        if adapters:
            shutil.rmtree(weights)
        import onnx_ir as ir

        model = ir.load(staging / "model.onnx")
        prepare_graph(model, decoder_settings(staging))
        stamp_merged(model, request, manifest)
        save_graph(model, staging / "model.onnx")
        check_decoder_parity(request, staging, manifest, recipe)
        write_manifest(staging, manifest)
    return {**plan, "merge_seconds": round(merged_at - request.started, 2), **request.done(manifest)}


def merge_adapters(
    request: Request, recipe: Recipe | None, output: Path, dry_run: bool = False
) -> dict[str, dict[str, Any]]:
    """Write the checkpoint with the request's adapters merged to `output`; return name -> source, method, sha256."""
    from adapter_merge.api.merge import merge
    from adapter_merge.api.options import MergeOptions
    from adapter_merge.combine.delta_ops import Settings
    from adapter_merge.combine.recipe import Ingredient, make_recipe
    from adapter_merge.formats.stated_settings import ReadOptions

    dtype = DTYPES[request.precision]
    quantised = request.checkpoint.stored is not None
    reading = ReadOptions(force=True) if request.force else None
    options = MergeOptions(
        dtype=dtype, write_as=dtype if quantised else None, device="cpu", dry_run=dry_run, reading=reading
    )
    adapters, names = request.adapters, list(request.adapters)
    if recipe is None and len(names) > 1:
        recipe = make_recipe([Ingredient(name, str(path)) for name, path in adapters.items()], Settings())
    if recipe is not None and request.force:
        forced = [replace(item, options={**(item.options or {}), "force": True}) for item in recipe.ingredients]
        recipe = replace(recipe, ingredients=tuple(forced))
    if recipe is not None:
        names = [item.name for item in recipe.ingredients]
    result = merge(request.checkpoint.folder, recipe or adapters[names[0]], output, options)
    return {
        name: {
            "source": str(adapters[name]),
            **{key: entry[key] for key in ("method", "sha256", "origin", "contradictions") if entry.get(key)},
        }
        for name, entry in zip(names, result.as_json()["adapters"], strict=True)
    }


def add_merged(manifest: Manifest, entries: Mapping[str, dict[str, Any]], recipe: Recipe | None) -> None:
    """Add the merged adapters and their combination to `manifest`."""
    manifest.adapters |= entries
    if recipe is not None:
        manifest.options["combination"] = recipe.as_json()


def stamp_merged(model: ir.Model, request: Request, manifest: Manifest) -> None:
    """Write the names and hashes of base and adapters into the graph's metadata."""
    stamp(model, replace(request.layout(), adapters=tuple(manifest.adapters)))
    for name, entry in manifest.adapters.items():
        model.metadata_props[f"adapter_merge.adapter.{name}"] = entry["sha256"]
