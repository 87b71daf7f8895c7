"""Switchable export: one graph, one weights file, one small file per adapter.

What is exact: fp32 exports compute the adapter as trained. Over an int4 base the factors and scales stay in
floating point and are added to the quantised product, which is not the same as merging and then quantising.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_merge.export.building.decoder import build_decoder
from adapter_merge.export.checking.parity import check_decoder_parity
from adapter_merge.export.engine.decoder_settings import decoder_settings
from adapter_merge.export.folder.atomic_change import hidden
from adapter_merge.export.folder.contents import save_graph, write_manifest
from adapter_merge.export.graph.adapter_file import SUFFIX, write_adapter
from adapter_merge.export.graph.decoder_inputs import prepare_graph
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.insertion import insert_switches
from adapter_merge.export.graph.targets import Layout
from adapter_merge.outputs.staging import staged

from .decoder_with_adapters import adapted_layout, begin


def export_switchable(base: str | Path, adapters: Mapping[str, Path], output: Path, **options: Any) -> dict[str, Any]:
    """Write the switchable export of `base` with `adapters` to `output`; return the report (options: open_request).

    Raises InputError, MismatchError, UnsupportedError, OutputError, MissingDependencyError before the build.
    """
    request, factors, plan = begin(base, adapters, output, "switchable", options)
    if request.dry_run:
        return plan
    with staged(output, request.overwrite, request.checkpoint.snapshot) as staging:
        build_decoder(request.checkpoint.folder, staging, request.precision, request.device)
        built = time.perf_counter()
        import onnx_ir as ir

        model = ir.load(staging / "model.onnx")
        prepare_graph(model, decoder_settings(staging))
        layout = replace(adapted_layout(model, request, factors), branched=request.device == "cpu")
        insert_switches(model, layout)
        save_graph(model, staging / "model.onnx")
        manifest = request.manifest()
        manifest.adapters |= write_adapters(factors, adapters, layout, staging)
        check_decoder_parity(request, staging, manifest)
        write_manifest(staging, manifest)
    return {
        **plan,
        "targets": len(layout.targets),
        "adapter_bytes": {name: entry["bytes"] for name, entry in manifest.adapters.items()},
        "build_seconds": round(built - request.started, 2),
        **request.done(manifest),
    }


def write_adapters(
    factors: Mapping[str, Factors], sources: Mapping[str, Path], layout: Layout, folder: Path, *, hide: bool = False
) -> dict[str, dict[str, Any]]:
    """Write NAME.onnx_adapter for each of `factors` into `folder`, with `hide` under the name that pending.commit
    replaces; return the manifest's entries."""
    entries = {}
    for name, value in factors.items():
        file = folder / f"{name}{SUFFIX}"
        size = write_adapter(value, layout, hidden(file) if hide else file)
        entries[name] = {"source": str(sources[name]), "file": file.name, "bytes": size, **value.evidence()}
    return entries
