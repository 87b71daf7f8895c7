"""Export by torch.onnx of models that the builder does not support: encoders (building/encoder_task.py) and GPT-2.

A classifier's head is trained with its adapter. In a switchable export it is an adapter tensor like any other:
an optional input, named as in the checkpoint, with the base's head as its default; its number of labels may
differ from adapter to adapter.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.binding.positional import QUERY
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
from adapter_merge.export.graph.insertion import insert_switches, make_optional, split_gemm
from adapter_merge.export.graph.pooling import MODULES, Pooling, read_pooling, write_modules
from adapter_merge.export.graph.targets import POSITIONS, Layout, ModuleSlice, Target
from adapter_merge.outputs.staging import staged
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint

from .batched import DATA, batched_entries, stack, write_stacks
from .merged import add_merged, merge_adapters, stamp_merged
from .switchable import write_adapters

if TYPE_CHECKING:
    import onnx_ir as ir

    from adapter_merge.combine.recipe import Recipe

LAYER = re.compile(r"(.*\.)?\d+\..*")


@dataclass(frozen=True)
class Traced:
    """What is traced of a base."""

    name_of_class: str  # of transformers
    pooling: Pooling | None  # of a sentence encoder

    @property
    def kind(self) -> str:
        return "decoder" if self.name_of_class == GPT2 else "encoder"

    @property
    def labels_vary(self) -> bool:
        """True for logits by label, of which another adapter's head may have another number."""
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

    pooling, normalize: of a sentence encoder ("none": hidden states alone); from the files of sentence-transformers
    when not given. Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError before the
    trace.
    """
    if mode == "batched" and not adapters:
        raise InputError("a batched export without adapters", expected="at least one NAME=ADAPTER")
    request = open_request(base, adapters, output, mode=mode, traced=True, **options)
    needed = request.reserve(export_bytes(request.checkpoint, "fp32") * (2 if mode == "merged" and adapters else 1))
    factors = request.factors()
    traced = what_to_trace(request.checkpoint, factors, pooling, normalize)
    check_task(request, factors, traced)
    plan = request.plan({name: figures(value) for name, value in factors.items()}) | {"class": traced.name_of_class}
    if traced.pooling is not None:
        plan["pooling"] = str(traced.pooling)
    if request.dry_run:
        return {**plan, "dry_run": True, "bytes_needed": needed}
    said: dict[str, Any] = {"class": traced.name_of_class}
    if traced.pooling is not None:
        said["pooling"] = {"mode": traced.pooling.mode, "normalised": traced.pooling.normalised}
    if traced.labels_vary:
        said["labels"] = label_count(traced.name_of_class, tensor_shapes(request.checkpoint, factors))
    manifest = request.manifest(traced.kind, **said)
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


def what_to_trace(
    checkpoint: Checkpoint, factors: Mapping[str, Factors], pooling: str | None, normalize: bool
) -> Traced:
    """Return the class and the pooling.

    A pooling that is stated asks for the body; so does one that the base's files state, where nobody brings a head.
    """
    if pooling is not None:
        found = None if pooling == "none" else Pooling(pooling, normalize)
        return Traced(task_class(checkpoint, factors, body=True), found)
    name_of_class = task_class(checkpoint, factors)
    if name_of_class == GPT2 or name_of_class.endswith(tuple(TASKS)):
        return Traced(name_of_class, None)
    found = read_pooling(checkpoint.folder)
    return Traced(name_of_class if found is None else task_class(checkpoint, factors, body=True), found)


def check_task(request: Request, factors: Mapping[str, Factors], traced: Traced) -> None:
    """Raise UnsupportedError, with every problem, for what cannot be traced in this precision or with these heads."""
    problems = []
    allowed = ("fp32",) if traced.kind == "decoder" else PRECISIONS
    if request.precision not in allowed:
        problems.append(
            Problem(f"{request.precision} is not for {traced.name_of_class}", ", ".join(allowed), request.precision)
        )
    if request.mode == "batched" and request.precision == "int8":
        problems.append(Problem("int8 is for merged and switchable encoders", "fp32 or fp16 with --mode batched"))
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
                f"{value.source}: brings a head ({name}), which a sentence encoder leaves out",
                hint="export without --pooling, as the task of the head",
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
        # in float32: the graph is converted as a whole
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
    fitting = {name: aligned(value, layout) for name, value in factors.items()}
    slots = {target.name: [packed(target, value.linears) for value in fitting.values()] for target in layout.targets}
    used = [target for target in layout.targets if any(value is not None for value in slots[target.name])]
    by_sequence(model, used)
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
    """Return the traced base, in half precision for fp16, and the layout of what can be adapted in it."""
    replaced = {name for value in factors.values() for name in value.replacements}
    shapes = tensor_shapes(request.checkpoint, factors)
    model = trace(request, request.checkpoint.folder, traced, shapes, tuple(sorted(replaced)), staging, work)
    if request.precision == "fp16":
        model = half(model)
    named = {module for value in factors.values() for module in value.linears}
    return model, request.layout(traced_targets(model, named), {name: name for name in head_tensors(model, replaced)})


def tensor_shapes(checkpoint: Checkpoint, factors: Mapping[str, Factors]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's tensors, and of the heads that it lacks and an adapter brings."""
    brought = {name: tensor.shape for value in factors.values() for name, tensor in value.replacements.items()}
    return {**brought, **{name: ref.shape for name, ref in checkpoint.tensors.items()}}


def by_sequence(model: ir.Model, targets: list[Target]) -> None:
    """Give every product of `targets` its tokens by sequence, (batch, sequence, k), in place.

    GPT-2 multiplies (batch * sequence, k): its product takes what is reshaped there instead. Raises UnsupportedError
    for a product that is computed once for all sequences, as a pooler's or those of DeBERTa's relative positions.
    """
    nodes = {node.name: node for node in model.graph}
    batch = next(value for value in model.graph.inputs if value.name == "input_ids").shape
    assert batch is not None
    problems = []
    for target in targets:
        for name in target.nodes:
            product = nodes[name]
            x = product.inputs[0]
            maker = x.producer() if x is not None else None
            if maker is not None and maker.op_type == "Reshape" and _by_sequence(maker.inputs[0], batch[0]):
                product.replace_input_with(0, maker.inputs[0])
                product.outputs[0].shape = None
            elif not _by_sequence(x, batch[0]):
                problems.append(
                    Problem(
                        f"{target.name}: is not computed for each sequence of a batch alone",
                        hint="export with --mode merged or switchable",
                    )
                )
    raise_all(problems, UnsupportedError)


def _by_sequence(value: Any, batch: Any) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 3 and value.shape[0] == batch


def trace(
    request: Request,
    weights: Path,
    traced: Traced,
    shapes: Mapping[str, tuple[int, ...]],  # of the tensors, an adapter's heads among them
    keep: tuple[str, ...],  # weights that keep their orientation
    staging: Path,
    work: Path,
) -> ir.Model:
    """Run trace_process on `weights`; return the graph, and write config.json into `staging`.

    A decoder's graph and weights lie in `staging`, an encoder's in `work`.
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


def traced_targets(model: ir.Model, named: set[str]) -> tuple[Target, ...]:
    """Return the products by module path: the layers' linears, and those outside that an adapter names."""
    graph = model.graph
    products: dict[str, list[Any]] = {}
    for node in list(graph):
        module = node.metadata_props.get("module")
        if module is None or node.op_type not in ("MatMul", "Gemm"):
            continue
        wanted = module in named or any(_same(module, name) for name in named)
        if LAYER.fullmatch(module) is None and not wanted:
            continue
        weight = node.inputs[1]
        own = weight is not None and weight.name == f"{module}.weight"
        turned = weight is not None and weight.producer() is not None
        if not own and not (turned and weight.producer().inputs[0].name == f"{module}.weight"):
            continue  # attention scores, computed in the module's own forward
        products.setdefault(module, []).append(split_gemm(graph, node) if node.op_type == "Gemm" else node)
    targets = []
    for path, nodes in _separate_positional(products).items():
        module = path.removesuffix(POSITIONS)
        weight = graph.initializers[f"{module}.weight"]
        assert weight.shape is not None
        rows, columns = (int(size) for size in weight.shape.numpy())
        direct = nodes[0].inputs[1] is weight
        k, n = (rows, columns) if direct else (columns, rows)
        names = tuple(str(node.name) for node in nodes)
        targets.append(Target(path, names, k, n, (ModuleSlice(path, 0, n),)))
    return tuple(targets)


def _separate_positional(products: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the products by module path, with a DeBERTa's positional queries separate from its tokens'.

    The product of the tokens has the input that value_proj has; the other one is of the relative embeddings.
    """
    apart: dict[str, list[Any]] = {}
    for module, nodes in products.items():
        if len(nodes) == 1 or not f".{module}".endswith(f".{QUERY}"):
            apart[module] = nodes
            continue
        tokens = products[module.replace("query_proj", "value_proj")][0].inputs[0]
        apart[module] = [node for node in nodes if node.inputs[0] is tokens]
        apart[module + POSITIONS] = [node for node in nodes if node.inputs[0] is not tokens]
        if [len(apart[module]), len(apart[module + POSITIONS])] != [1, 1]:
            raise UnsupportedError(
                f"{module}: which of its products is of the tokens?",
                expected="two products, one with the input of value_proj",
                got=f"{len(nodes)} products",
                hint="export with --mode merged",
            )
    return apart


def _same(path: str, name: str) -> bool:
    """Return True when a module's path differs from an adapter's name by one leading component."""
    return path.partition(".")[2] == name or name.partition(".")[2] == path


def head_tensors(model: ir.Model, replaced: set[str]) -> list[str]:
    """Return the weights outside layers and embeddings (pooler, classifier), and those that an adapter replaces."""
    names = []
    for name in model.graph.initializers:
        outside = name.startswith(HEADS) or ".pooler." in name
        if outside or any(name == other or _same(name, other) for other in replaced):
            names.append(name)
    return names


def _clean(model: ir.Model, traced: Traced) -> None:
    """Remove intermediate shapes (onnxruntime infers them; the number of labels may vary) and module paths."""
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
    """Copy the checkpoint's tokenizer files; modules.json is written anew where there is a pooling."""
    for relative in checkpoint.side_files:
        target = folder / relative
        if (
            len(relative.parts) == 1
            and not target.exists()
            and relative.name not in ("README.md", "adapter_merge.json", MODULES)
        ):
            shutil.copyfile(checkpoint.folder / relative, target)
