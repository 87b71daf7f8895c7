"""Export by torch.onnx of models that the builder does not support: BERT, RoBERTa, DeBERTa-v2 (with heads), GPT-2.

A classifier's head is trained with its adapter. In a switchable export it is an adapter tensor like any other:
an optional input, named as in the checkpoint, with the base's head as its default; its number of labels may
differ from adapter to adapter.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.binding.positional import QUERY
from adapter_merge.errors import Problem, UnsupportedError, raise_all
from adapter_merge.export.building.child_process import run_module
from adapter_merge.export.building.request import Request, export_bytes, figures, open_request
from adapter_merge.export.checking.parity import check_decoder_parity, check_encoder_parity
from adapter_merge.export.folder.contents import save_graph, write_manifest
from adapter_merge.export.folder.manifest import Manifest
from adapter_merge.export.graph.adapter_file import match_all
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.insertion import insert_switches, make_optional, split_gemm
from adapter_merge.export.graph.targets import POSITIONS, ModuleSlice, Target
from adapter_merge.outputs.staging import staged
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint

from .merged import add_merged, merge_adapters, stamp_merged
from .switchable import write_adapters

if TYPE_CHECKING:
    import onnx_ir as ir

    from adapter_merge.combine.recipe import Recipe

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "deberta-v2": "DebertaV2"}
TASKS = {
    "ForSequenceClassification": ("classifier.weight", "classifier.out_proj.weight"),
    "ForTokenClassification": ("classifier.weight",),
    "ForQuestionAnswering": ("qa_outputs.weight",),
}
BODIES = ("Model", "ForMaskedLM", "ForPreTraining")  # pretrained, without a head that an adapter could use
GPT2 = "GPT2LMHeadModel"
TRACED = (GPT2, *(family + end for family in FAMILIES.values() for end in (*TASKS, *BODIES)))
LAYER = re.compile(r"(.*\.)?\d+\..*")


def export_traced(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    mode: str = "merged",
    recipe: Recipe | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write the export of an encoder or GPT-2 to `output`; return the report. Options: see request.open_request.

    Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError before the trace.
    """
    problems = []
    if mode == "batched":
        problems.append(Problem("--mode batched is for decoders of the model builder", "merged or switchable"))
    if (precision := options.get("precision", "fp32")) != "fp32":
        problems.append(Problem(f"{precision} is for decoders of the model builder", "--precision fp32", precision))
    raise_all(problems, UnsupportedError)
    request = open_request(base, adapters, output, mode=mode, traced=True, **options)
    needed = request.reserve(export_bytes(request.checkpoint, "fp32") * (2 if mode == "merged" and adapters else 1))
    factors = request.factors()
    name_of_class = task_class(request.checkpoint, factors)
    check_labels(request.checkpoint, factors, name_of_class)
    plan = request.plan({name: figures(value) for name, value in factors.items()}) | {"class": name_of_class}
    if request.dry_run:
        return {**plan, "dry_run": True, "bytes_needed": needed}
    manifest = request.manifest("decoder" if name_of_class == GPT2 else "encoder", **{"class": name_of_class})
    with staged(output, request.overwrite, request.checkpoint.snapshot) as staging:
        if mode == "merged":
            _trace_merged(request, recipe, name_of_class, staging, manifest)
        else:
            _trace_switchable(request, factors, name_of_class, staging, manifest)
        copy_side_files(request.checkpoint, staging)
        if manifest.kind == "decoder":
            check_decoder_parity(request, staging, manifest, recipe)
        else:
            check_encoder_parity(request, staging, manifest, recipe)
        write_manifest(staging, manifest)
    sizes = {name: entry["bytes"] for name, entry in manifest.adapters.items() if "bytes" in entry}
    return {**plan, "adapter_bytes": sizes, **request.done(manifest)}


def task_class(checkpoint: Checkpoint, factors: Mapping[str, Factors]) -> str:
    """Return the transformers class to trace: the checkpoint's own, or the task of the heads that the adapters carry.

    Raises UnsupportedError when there is no head to classify with.
    """
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    if architecture == GPT2 or architecture.endswith(tuple(TASKS)):
        return str(architecture)
    family = FAMILIES[checkpoint.config["model_type"]]
    replaced = {name for value in factors.values() for name in value.replacements}
    if "qa_outputs.weight" in replaced:
        return family + "ForQuestionAnswering"
    if replaced & {"classifier.weight", "classifier.out_proj.weight"}:
        return family + "ForSequenceClassification"
    raise UnsupportedError(
        f"{checkpoint.folder}: {architecture} has no head, and no adapter brings one",
        expected=", ".join(TASKS),
        hint="export with an adapter that carries its classifier, or from a checkpoint with a head",
    )


def check_labels(checkpoint: Checkpoint, factors: Mapping[str, Factors], name_of_class: str) -> None:
    """Raise UnsupportedError for a question-answering head of another size than transformers' own: start and end."""
    if not name_of_class.endswith("ForQuestionAnswering"):
        return
    heads = {str(checkpoint.folder): {name: ref.shape for name, ref in checkpoint.tensors.items()}}
    heads |= {
        str(value.source): {key: head.shape for key, head in value.replacements.items()} for value in factors.values()
    }
    problems = [
        Problem(
            f"{source}: its head answers questions with {shapes['qa_outputs.weight'][0]} numbers a token",
            "2: start and end",
        )
        for source, shapes in heads.items()
        if "qa_outputs.weight" in shapes and shapes["qa_outputs.weight"][0] != 2
    ]
    raise_all(problems, UnsupportedError)


def _trace_merged(
    request: Request, recipe: Recipe | None, name_of_class: str, staging: Path, manifest: Manifest
) -> None:
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix=".merged-", dir=staging.parent) as temporary:
        weights = request.checkpoint.folder
        if request.adapters:
            weights = Path(temporary) / "model"
            add_merged(manifest, merge_adapters(request, recipe, weights), recipe)
        shapes = {name: ref.shape for name, ref in open_base(weights).tensors.items()}
        trace(weights, staging, name_of_class, label_count(name_of_class, shapes), (), request.checkpoint.folder)
    model = ir.load(staging / "model.onnx")
    _clean(model)
    stamp_merged(model, request, manifest)
    save_graph(model, staging / "model.onnx")


def _trace_switchable(
    request: Request, factors: Mapping[str, Factors], name_of_class: str, staging: Path, manifest: Manifest
) -> None:
    import onnx_ir as ir

    checkpoint = request.checkpoint
    shapes: dict[str, tuple[int, ...]] = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    for value in factors.values():
        for name, tensor in value.replacements.items():
            shapes.setdefault(name, tensor.shape)
    replaced = {name for value in factors.values() for name in value.replacements}
    trace(checkpoint.folder, staging, name_of_class, label_count(name_of_class, shapes), keep=tuple(sorted(replaced)))
    model = ir.load(staging / "model.onnx")
    named = {module for value in factors.values() for module in value.linears}
    layout = request.layout(traced_targets(model, named), {name: name for name in head_tensors(model, replaced)})
    match_all(factors, layout)
    insert_switches(model, layout)
    for name in layout.heads:
        make_optional(model, name)
    _clean(model)
    save_graph(model, staging / "model.onnx")
    manifest.adapters |= write_adapters(factors, request.adapters, layout, staging)


def trace(
    checkpoint: Path,
    output: Path,
    name_of_class: str,
    labels: int | None,
    keep: tuple[str, ...],
    source: Path | None = None,  # what errors call the checkpoint
) -> None:
    """Run trace_process: model.onnx and model.onnx.data in `output`; weights in `keep` keep their orientation."""
    job = {
        "checkpoint": str(checkpoint.resolve()),
        "output": str(output.resolve()),
        "class": name_of_class,
        "labels": labels,
        "keep": list(keep),
    }
    run_module(
        "adapter_merge.export.building.trace_process",
        job,
        output,
        f"torch.onnx could not export {name_of_class} of {source or checkpoint}",
        output / "model.onnx",
        {str(job["checkpoint"]): str(source or checkpoint), str(job["output"]): "the export"},
    )


def label_count(name_of_class: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of labels of the head in `shapes`; None for a language model."""
    for end, names in TASKS.items():
        if name_of_class.endswith(end):
            for name in names:
                if name in shapes:
                    return int(shapes[name][0])
    return None


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
        outside = name.startswith(("classifier.", "qa_outputs.", "pooler.")) or ".pooler." in name
        if outside or any(name == other or _same(name, other) for other in replaced):
            names.append(name)
    return names


def _clean(model: ir.Model) -> None:
    """Remove intermediate shapes (onnxruntime infers them; the number of labels may vary) and module paths."""
    import onnx_ir as ir

    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None
    for value in model.graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:-1], "labels"])


def copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the checkpoint's tokenizer files."""
    import shutil

    for relative in checkpoint.side_files:
        target = folder / relative
        if (
            len(relative.parts) == 1
            and not target.exists()
            and relative.name not in ("README.md", "adapter_merge.json")
        ):
            shutil.copyfile(checkpoint.folder / relative, target)
