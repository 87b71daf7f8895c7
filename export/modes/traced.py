"""Export by torch.onnx of models that the builder does not support: encoders (graph/encoder_task.py) and GPT-2.

The head of a classifier is trained with its adapter. A switchable export therefore has the head as an optional input,
named as in the checkpoint, whose default is the base's head. The number of labels may differ between adapters.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.export.building.checks_before_build import Request, export_bytes, figures, open_request
from adapter_merge.export.building.child_process import run_module
from adapter_merge.export.building.encoder_precision import PRECISIONS, half, save_encoder
from adapter_merge.export.checking.parity import check_decoder_parity, check_encoder_parity
from adapter_merge.export.folder.contents import save_graph, write_manifest
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.adapter_file import aligned, match_all, packed
from adapter_merge.export.graph.adapter_ids import insert_stacks
from adapter_merge.export.graph.encoder_task import (
    GPT2,
    HEADS,
    TASKS,
    check_labels,
    is_body,
    label_count,
    outputs_of,
    task_class,
)
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.insertion import insert_switches, make_optional
from adapter_merge.export.graph.pooling import MODULES, Pooling, read_pooling, write_modules
from adapter_merge.export.graph.targets import Layout
from adapter_merge.export.graph.traced_targets import head_tensors, separate_sequences, traced_targets
from adapter_merge.outputs.staging import staged
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint

from .batched import DATA, batched_entries, stack, write_stacks
from .merged import add_merged, merge_adapters, stamp_merged
from .switchable import write_adapters

if TYPE_CHECKING:
    import onnx_ir as ir

    from adapter_merge.combine.recipe import Recipe


@dataclass(frozen=True)
class Traced:
    """The model that is traced."""

    name_of_class: str  # transformers' class
    pooling: Pooling | None  # of a sentence encoder

    @property
    def kind(self) -> str:
        return "decoder" if self.name_of_class == GPT2 else "encoder"

    @property
    def labels_vary(self) -> bool:
        """True for a model with labels; their number may differ between the heads of adapters."""
        return self.name_of_class.endswith(tuple(TASKS))

    @property
    def outputs(self) -> tuple[str, ...]:
        return outputs_of(self.name_of_class, self.pooling is not None)


def export_traced(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    mode: str = "merged",
    recipe: Recipe | None = None,
    pooling: str | None = None,
    normalize: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write the export of an encoder or GPT-2 to `output`; return the report. Options: see request.open_request.

    pooling, normalize: of a sentence encoder ("none": only the hidden states); None: as the files of
    sentence-transformers in the base state. Raises InputError, MismatchError, UnsupportedError, OutputError or
    MissingDependencyError before the trace.
    """
    if mode == "batched" and not adapters:
        raise InputError("a batched export needs adapters", expected="at least one NAME=ADAPTER")
    request = open_request(base, adapters, output, mode=mode, traced=True, **options)
    needed = request.reserve(export_bytes(request.checkpoint, "fp32") * (2 if mode == "merged" and adapters else 1))
    factors = request.factors()
    traced = choose_model(request.checkpoint, factors, pooling, normalize)
    check_task(request, factors, traced)
    plan = request.plan({name: figures(value) for name, value in factors.items()}) | {"class": traced.name_of_class}
    if traced.pooling is not None:
        plan["pooling"] = str(traced.pooling)
    if request.dry_run:
        return {**plan, "dry_run": True, "bytes_needed": needed}
    manifest = request.manifest(traced.kind, **_manifest_options(request, factors, traced))
    write = {"merged": _write_merged, "switchable": _write_switchable, "batched": _write_batched}[mode]
    with staged(output, request.overwrite, request.checkpoint.snapshot) as staging:
        with tempfile.TemporaryDirectory(prefix=".traced-", dir=staging.parent) as temporary:
            write(request, factors, recipe, traced, staging, manifest, Path(temporary))
        copy_side_files(request.checkpoint, staging)
        if traced.pooling is not None:
            write_modules(staging, traced.pooling, int(request.checkpoint.config.get("hidden_size", 0)))
        if traced.kind == "decoder":
            check_decoder_parity(request, staging, manifest, recipe)
        else:
            check_encoder_parity(request, staging, manifest, recipe)
        write_manifest(staging, manifest)
    sizes = {name: entry["bytes"] for name, entry in manifest.adapters.items() if "bytes" in entry}
    return {**plan, "adapter_bytes": sizes, **request.done(manifest)}


def _manifest_options(request: Request, factors: Mapping[str, Factors], traced: Traced) -> dict[str, Any]:
    options: dict[str, Any] = {"class": traced.name_of_class}
    if traced.pooling is not None:
        options["pooling"] = {"mode": traced.pooling.mode, "normalised": traced.pooling.normalised}
    if traced.labels_vary:
        options["labels"] = label_count(traced.name_of_class, tensor_shapes(request.checkpoint, factors))
    return options


def choose_model(
    checkpoint: Checkpoint, factors: Mapping[str, Factors], pooling: str | None, normalize: bool
) -> Traced:
    """Return the class to trace, and the pooling of a sentence encoder.

    A pooling is computed from the hidden states of the body. The body is traced where the caller states a pooling, and
    where the base's files state one and neither the base nor an adapter has a head.
    """
    if pooling is not None:
        stated = None if pooling == "none" else Pooling(pooling, normalize)
        return Traced(task_class(checkpoint, factors, body=True), stated)
    name_of_class = task_class(checkpoint, factors)
    if name_of_class == GPT2 or name_of_class.endswith(tuple(TASKS)):
        return Traced(name_of_class, None)
    found = read_pooling(checkpoint.folder)
    return Traced(name_of_class if found is None else task_class(checkpoint, factors, body=True), found)


def check_task(request: Request, factors: Mapping[str, Factors], traced: Traced) -> None:
    """Raise UnsupportedError, with every problem, for a precision, a mode or a head that cannot be exported."""
    problems = []
    allowed = ("fp32",) if traced.kind == "decoder" else PRECISIONS
    if request.precision not in allowed:
        problems.append(
            Problem(
                f"{traced.name_of_class} cannot be exported in {request.precision}",
                ", ".join(allowed),
                request.precision,
            )
        )
    if request.mode == "batched" and request.precision == "int8":
        problems.append(Problem("a batched encoder cannot be exported in int8", "fp32 or fp16 with --mode batched"))
    if request.mode == "batched":
        problems += [
            Problem(
                f"{value.source}: replaces {name}, which a batched export cannot switch",
                hint="export with --mode merged or switchable",
            )
            for value in factors.values()
            for name in value.replacements
        ]
    if is_body(traced.name_of_class):
        problems += [
            Problem(
                f"{value.source}: has a head ({name}), and a sentence encoder has none",
                hint="export without --pooling",
            )
            for value in factors.values()
            for name in value.replacements
            if name.startswith(HEADS[:2])
        ]
    raise_all(problems, UnsupportedError)
    check_labels(request.checkpoint, factors, traced.name_of_class)


def _write_merged(
    request: Request,
    factors: Mapping[str, Factors],
    recipe: Recipe | None,
    traced: Traced,
    staging: Path,
    manifest: Manifest,
    work: Path,
) -> None:
    weights = request.checkpoint.folder
    if request.adapters:
        weights = work / "model"
        # The merge stays in float32, and the traced graph is converted to the precision.
        add_merged(manifest, merge_adapters(replace(request, precision="fp32"), recipe, weights), recipe)
    shapes = {name: ref.shape for name, ref in open_base(weights).tensors.items()}
    model = trace(request, weights, traced, shapes, (), staging, work)
    _clean(model, traced)
    if request.precision == "fp16":
        model = half(model)
    stamp_merged(model, request, manifest)
    _save(model, traced, staging, request.precision)


def _write_switchable(
    request: Request,
    factors: Mapping[str, Factors],
    recipe: Recipe | None,
    traced: Traced,
    staging: Path,
    manifest: Manifest,
    work: Path,
) -> None:
    model, layout = _adapted(request, factors, traced, staging, work)
    match_all(factors, layout)
    insert_switches(model, layout)
    for name in layout.heads:
        make_optional(model, name)
    _clean(model, traced)
    _save(model, traced, staging, request.precision)
    manifest.adapters |= write_adapters(factors, request.adapters, layout, staging)


def _write_batched(
    request: Request,
    factors: Mapping[str, Factors],
    recipe: Recipe | None,
    traced: Traced,
    staging: Path,
    manifest: Manifest,
    work: Path,
) -> None:
    model, layout = _adapted(request, factors, traced, staging, work)
    layout = replace(layout, heads={}, adapters=tuple(factors))
    match_all(factors, layout)
    renamed = {name: aligned(value, layout) for name, value in factors.items()}
    slots = {target.name: [packed(target, value.linears) for value in renamed.values()] for target in layout.targets}
    used = [target for target in layout.targets if any(value is not None for value in slots[target.name])]
    separate_sequences(model, used)
    if traced.kind == "decoder":
        _clean(model, traced)
        write_stacks(model, layout, slots, staging / DATA, staging / "model.onnx")
    else:
        stacks = {target.name: stack(target, slots[target.name]) for target in used}
        insert_stacks(model, layout, {name: value for name, value in stacks.items() if value is not None})
        _clean(model, traced)
        _save(model, traced, staging, request.precision)
    manifest.adapters |= batched_entries(request, factors, None if traced.kind == "encoder" else DATA)


def _adapted(
    request: Request, factors: Mapping[str, Factors], traced: Traced, staging: Path, work: Path
) -> tuple[ir.Model, Layout]:
    """Return the graph of the base, in float16 for fp16, and the layout of its targets and heads."""
    replaced = {name for value in factors.values() for name in value.replacements}
    shapes = tensor_shapes(request.checkpoint, factors)
    model = trace(request, request.checkpoint.folder, traced, shapes, tuple(sorted(replaced)), staging, work)
    if request.precision == "fp16":
        model = half(model)
    named = {module for value in factors.values() for module in value.linears}
    return model, request.layout(traced_targets(model, named), {name: name for name in head_tensors(model, replaced)})


def tensor_shapes(checkpoint: Checkpoint, factors: Mapping[str, Factors]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's tensors, and of the adapters' heads that the base does not have."""
    heads = {name: tensor.shape for value in factors.values() for name, tensor in value.replacements.items()}
    return {**heads, **{name: ref.shape for name, ref in checkpoint.tensors.items()}}


def trace(
    request: Request,
    weights: Path,
    traced: Traced,
    shapes: Mapping[str, tuple[int, ...]],  # of the tensors, with those of the adapters' heads
    keep: tuple[str, ...],  # weights that are not stored transposed
    staging: Path,
    work: Path,
) -> ir.Model:
    """Run trace_process on the checkpoint in `weights`; return the graph, and write config.json into `staging`.

    The files of a decoder's graph are written to `staging`, those of an encoder's to `work`.
    """
    import onnx_ir as ir

    folder = staging if traced.kind == "decoder" else work
    source = request.checkpoint.folder
    pooling = traced.pooling
    job = {
        "checkpoint": str(weights.resolve()),
        "output": str(folder.resolve()),
        "class": traced.name_of_class,
        "outputs": list(traced.outputs),
        "pooling": [pooling.mode, pooling.normalised] if pooling is not None else None,
        "labels": label_count(traced.name_of_class, shapes),
        "keep": list(keep),
    }
    run_module(
        "adapter_merge.export.building.trace_process",
        job,
        folder,
        f"torch.onnx could not export {traced.name_of_class} of {source}",
        folder / "model.onnx",
        {str(job["checkpoint"]): str(source), str(job["output"]): "the export"},
    )
    if folder != staging:
        shutil.copyfile(folder / "config.json", staging / "config.json")
    return ir.load(folder / "model.onnx")


def _save(model: ir.Model, traced: Traced, staging: Path, precision: str) -> None:
    if traced.kind == "decoder":
        save_graph(model, staging / "model.onnx")
    else:
        save_encoder(model, staging, precision)


def _clean(model: ir.Model, traced: Traced) -> None:
    """Remove module paths and intermediate shapes, which would fix the number of labels; onnxruntime infers shapes."""
    import onnx_ir as ir

    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None
    for value in model.graph.outputs:
        if traced.labels_vary and value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:-1], "labels"])


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the checkpoint's tokenizer files, without modules.json, which only an export with a pooling has."""
    for relative in checkpoint.side_files:
        target = folder / relative
        if (
            len(relative.parts) == 1
            and not target.exists()
            and relative.name not in ("README.md", "adapter_merge.json", MODULES)
        ):
            shutil.copyfile(checkpoint.folder / relative, target)
