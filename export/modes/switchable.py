"""Switchable export: one graph, one weights file, one small file per adapter.

What is exact: fp32 exports compute the adapter as trained. Over an int4 base the factors and scales stay in
floating point and are added to the quantised product, which is not the same as merging and then quantising.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.export.building.decoder import build_decoder
from adapter_merge.export.building.request import Request, export_bytes, figures, open_request
from adapter_merge.export.checking.parity import check_decoder_parity
from adapter_merge.export.engine.decoder_settings import decoder_settings
from adapter_merge.export.folder.contents import save_graph, write_manifest
from adapter_merge.export.folder.pending import hidden
from adapter_merge.export.graph.adapter_file import SUFFIX, write_adapter
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.insertion import insert_switches
from adapter_merge.export.graph.interface import prepare_graph
from adapter_merge.export.graph.targets import Layout, Target, decoder_targets
from adapter_merge.outputs.staging import staged
from adapter_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import onnx_ir as ir


def export_switchable(base: str | Path, adapters: Mapping[str, Path], output: Path, **options: Any) -> dict[str, Any]:
    """Write the switchable export of `base` with `adapters` to `output`; return the report (options: open_request).

    Raises InputError, MismatchError, UnsupportedError, OutputError, MissingDependencyError before the build.
    """
    request = open_request(base, adapters, output, mode="switchable", **options)
    needed = request.reserve(export_bytes(request.checkpoint, request.precision))
    factors = request.factors()
    check_modules(factors, request.checkpoint)
    plan = request.plan({name: figures(value) for name, value in factors.items()})
    if request.dry_run:
        return {**plan, "dry_run": True, "bytes_needed": needed}
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


def adapted_layout(model: ir.Model, request: Request, factors: Mapping[str, Factors]) -> Layout:
    """Return the layout: all linears of the layers are targets; lm_head only when an adapter adapts it (it is wide)."""
    shapes = {name: ref.shape for name, ref in request.checkpoint.tensors.items()}
    head = any("lm_head" in value.linears for value in factors.values())
    targets = decoder_targets([node.name or "" for node in model.graph], shapes, head=head)
    check_products(model, targets)
    return request.layout(targets)


def check_products(model: ir.Model, targets: tuple[Target, ...]) -> None:
    """Raise MismatchError unless every target's product has the shape that the checkpoint's linears have."""
    nodes = {node.name or "": node for node in model.graph}
    problems = []
    for target in targets:
        for name in target.nodes:
            node = nodes[name]
            if node.op_type == "MatMul":
                value = node.inputs[1]
                shape = tuple(value.shape) if value is not None and value.shape is not None else None
            else:
                shape = (node.attributes["K"].as_int(), node.attributes["N"].as_int())
            if shape != (target.k, target.n):
                problems.append(
                    Problem(f"{name}: the builder's product differs", str((target.k, target.n)), str(shape))
                )
    raise_all(problems, MismatchError)


LINEAR = re.compile(r"(model\.layers\.\d+\.(self_attn|mlp)\.\w+|lm_head)")


def check_modules(factors: Mapping[str, Factors], checkpoint: Checkpoint) -> None:
    """Raise MismatchError before the build when an adapter cannot be switched on this base."""
    problems = []
    for value in factors.values():
        for module, linear in value.linears.items():
            ref = checkpoint.tensors.get(f"{module}.weight")
            if ref is None and module == "lm_head":
                ref = checkpoint.tensors.get("model.embed_tokens.weight")
            got = (linear.up.shape[0], linear.down.shape[1])
            if ref is None or not LINEAR.fullmatch(module):
                problems.append(
                    Problem(
                        f"{value.source}: {module} cannot be switched in a graph",
                        expected="a linear of a layer's self_attn or mlp, or lm_head",
                        hint="export with --mode merged",
                    )
                )
            elif ref.shape != got:
                problems.append(Problem(f"{value.source}: {module} has another shape", str(ref.shape), str(got)))
        problems.extend(
            Problem(
                f"{value.source}: replaces {name} as a whole, which a decoder's graph cannot switch",
                hint="export with --mode merged",
            )
            for name in value.replacements
        )
    raise_all(problems, MismatchError)
