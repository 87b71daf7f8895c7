"""Comparison of every weight of an export with the adapter as trained; no model runs.

This file compares exports of onnxruntime-genai's model builder, traced_proof.py those of torch.onnx.

products    the matrix of every product is compared with the checkpoint's linears that it computes: with the method's
            formula in float64 where an adapter is merged into it, with the base's values elsewhere. For a quantised
            matrix, each code must be the nearest one to these values for its scale (block_quantised.py)
factors     switchable and batched: W0 + A B, times the row scale, where A, B and the scale come from the adapter's file
            or from its place in the stack
others      embeddings, norms and biases are compared with the base's

What the graph's metadata says about its products is not used. The linears of a product follow from the name that the
model builder gives it (targets.py) and from the shapes of the base's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import InputError
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.contents import read_export
from adapter_merge.export.graph.targets import Target, decoder_targets, read_layout
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.verification.compare_weights import WEIGHT_TOLERANCE, Progress, WeightFigures
from adapter_merge.verification.whole_formulas import modules_by_tensor, whole_weight

from .block_quantised import QuantisedRows, is_quantised, read_quantised_rows, unquantised_name
from .stored_adapter import ExportedFactors, read_exported_adapter, read_initialiser
from .traced_proof import is_traced, verify_traced_weights
from .verdict import find_adapter, header, weights_report

if TYPE_CHECKING:
    import onnx_ir as ir

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int4": torch.float32}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
FACTOR_ROUNDINGS = 4  # A, B and the row scale are rounded once each; their product may be off by as many ulp
OFFSET_NORMS = ("gemma",)  # families whose norms multiply by 1 + weight; the builder stores 1 + weight


def verify_weights(
    base: str | Path,
    adapter: str | Path | None,
    artefact: str | Path,
    *,
    name: str | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare every weight of the export in `artefact` with `adapter` on `base` (None: with the base alone).

    Takes the arguments of `verification.verify_onnx`, without those about texts and logits. Returns "layers" (the
    relative error of dW by weight), "compared" (the number of compared tensors, with those that no adapter changes),
    "notes" (initialisers that were not compared), "problems" and "passed". Raises InputError or MismatchError when the
    three do not belong together.
    """
    folder = Path(artefact)
    check_packages("onnx_ir")
    manifest = read_export(folder)
    if is_traced(manifest):
        check_packages("onnx_ir", "transformers")
        return verify_traced_weights(
            base, adapter, folder, manifest, name=name, base_kind=base_kind, options=options, progress=progress
        )
    if manifest.precision not in DTYPES:
        raise InputError(f"{folder}: cannot compare {manifest.precision} weights", expected=", ".join(DTYPES))
    bound = open_pair(base, adapter, base_kind, options) if adapter is not None else None
    checkpoint = bound.base if bound is not None else open_base(base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    model, graph = _open(folder)
    layout = read_layout(model.metadata_props, str(folder / "model.onnx"))
    stacks = {name for target in layout.targets for name in (target.down_name, target.up_name, target.scale_name)}
    factors, heads = read_exported_adapter(folder, manifest, layout, chosen, graph)
    dtype = torch.float16 if manifest.precision == "int4" and manifest.device == "cuda" else DTYPES[manifest.precision]
    proof = _Proof(checkpoint, bound, dtype, graph, factors, heads, stacks, progress)
    proof.run(_all_nodes(model.graph))
    return {
        **header(folder, manifest, chosen, adapter),
        **weights_report(adapter is not None, proof.layers, proof.compared, proof.notes(), proof.problems),
    }


class _Proof:
    """The comparison of every initialiser of one graph with the checkpoint and the adapter."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        bound: BoundAdapter | None,
        dtype: torch.dtype,  # of the export's weights
        graph: Mapping[str, ir.Value],
        factors: Mapping[str, ExportedFactors] | None,  # by target; None: merged into the products
        heads: Mapping[str, Tensor],  # weights that a switchable adapter replaces, by the checkpoint's names
        stacks: Collection[str],  # initialisers with the factors of a batched export's adapters
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.dtype, self.graph, self.factors, self.heads = checkpoint, dtype, graph, factors, heads
        self.modules = modules_by_tensor(bound) if bound is not None else {}
        self.replacements = bound.replacements if bound is not None else {}
        self.progress = progress
        self.layers: dict[str, WeightFigures] = {}
        self.problems: list[str] = []
        self.compared = 0
        self._read_initialisers = set(stacks)
        self._compared_tensors: set[str] = set()  # of the checkpoint

    def run(self, nodes: list[ir.Node]) -> None:
        """Compare the products, then every other initialiser; add a problem for every weight that is missing."""
        products = {_name(node): node for node in nodes if node.op_type in ("MatMul", "Gemm") or is_quantised(node)}
        shapes = {name: ref.shape for name, ref in self.checkpoint.tensors.items()}
        for target in decoder_targets([name for name in products if name], shapes, head=True):
            for node in nodes:
                if _name(node) == target.nodes[0]:
                    self._compare_product(target, node)
        self._compare_named()
        self._compare_heads()
        missing = sorted(set(self.checkpoint.tensors) - self._compared_tensors - {HEAD})
        missing = [name for name in missing if not name.endswith("rotary_emb.inv_freq")]
        if missing:
            self.problems.append(f"{len(missing)} weights of the base are not in the graph, first {missing[0]}")
        lacking = sorted(set(self.modules) - set(self.layers))
        if lacking:
            self.problems.append(f"{len(lacking)} adapted weights are not in the graph, first {lacking[0]}")
        bad = [name for name, layer in self.layers.items() if not layer.relative_error <= self._tolerance()]
        if bad:
            text = f"weights with a relative error of dW above {self._tolerance():.2g}"
            self.problems.append(f"{len(bad)} {text}, first {bad[0]}")
        if not self.compared:
            self.problems.append("nothing was compared: the graph has no product of the base")

    def notes(self) -> list[str]:
        """Return a note on the initialisers without a tensor in the base: constants of the builder."""
        rest = sorted(
            name
            for name, value in self.graph.items()
            if name not in self._read_initialisers and value.const_value is not None and value.const_value.size > 1
        )
        return [f"not compared: {len(rest)} tensors that the builder computes ({', '.join(rest[:4])})"] if rest else []

    def _tolerance(self) -> float:
        if self.dtype == torch.float32:
            return WEIGHT_TOLERANCE
        return FACTOR_ROUNDINGS * torch.finfo(self.dtype).eps

    def _compare_product(self, target: Target, node: ir.Node) -> None:
        matrix = read_quantised_rows(node, self._read) if is_quantised(node) else self._read_matrix(node)
        if matrix is None:
            self.problems.append(f"{node.name} does not multiply by a stored matrix")
            return
        if tuple(matrix.shape) != (target.n, target.k):
            self.problems.append(f"{node.name} multiplies by {tuple(matrix.shape)} instead of {(target.n, target.k)}")
            return
        for part in target.parts:
            self._compare_linear(
                f"{part.module}.weight", matrix[part.start : part.start + part.size], target, part.start
            )
            bias = self.graph.get(f"{_name(node).strip('/').replace('/', '.')[:-7]}.Add.bias")
            if bias is not None and bias.name is not None:
                stated = self._read(bias.name)[part.start : part.start + part.size]
                self._compare_unadapted(f"{part.module}.bias", stated)

    def _read_matrix(self, node: ir.Node) -> Tensor | None:
        """Return the matrix (n, k) of a product that is not quantised; None where it is not stored."""
        value = node.inputs[1]
        is_transposed = value is not None and value.producer() is not None
        if is_transposed:
            producer = value.producer()
            value = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
        if value is None or value.name not in self.graph:
            return None
        stored = self._read(value.name)
        return stored if is_transposed else stored.T

    def _compare_linear(self, name: str, got: Tensor | QuantisedRows, target: Target, start: int) -> None:
        """Compare the rows of one linear with the checkpoint's and the adapter's.

        got: (size, k), the rows from row `start` of the target's matrix on.
        """
        source = name
        if name == HEAD and name not in self.checkpoint.tensors and name not in self.replacements:
            source = EMBEDDINGS  # the head is tied to the embeddings
        items = self.modules.get(source)
        merged = self.factors is None
        if items is None or not merged:
            self._compare_unadapted(source, got, merged)
        if items is None:
            if self.factors is not None and target.name in self.factors:
                base = self._base(source).double()
                if not torch.equal(self.factors[target.name].apply(base, start), base):
                    self.problems.append(f"{source} is changed by the export, and not by the adapter")
            return
        factors = (self.factors or {}).get(target.name)
        change = None if merged else (lambda base: base if factors is None else factors.apply(base, start))
        self._compare_adapted(source, items, got, change)

    def _compare_adapted(
        self,
        name: str,
        items: Sequence[BoundModule],
        got: Tensor | QuantisedRows,
        change: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Compare W' with the method's formula by the relative error of dW.

        change: the function by which the export computes W' from W0; None where `got` is W'.
        """
        base, exact, slack = whole_weight(items)
        rounding = 0.0  # largest relative error of one rounding
        if change is not None:
            errors = (change(base) - exact).abs()
        elif isinstance(got, QuantisedRows):
            errors = got.excess(exact)
        else:
            errors = (got.double().reshape(exact.shape) - exact).abs()
            rounding = torch.finfo(self.dtype).eps / 2 if self.dtype != torch.float32 else 0.0
        errors = (errors - rounding * exact.abs() - (slack if slack is not None else 0.0)).clamp_min(0)
        size = float(torch.linalg.vector_norm(exact - base))
        error = float(torch.linalg.vector_norm(errors))
        relative = error / size if size else error
        if relative != relative:
            relative = math.inf
        before = self.layers.get(name)
        worst = max(relative, before.relative_error if before is not None else 0.0)
        self.layers[name] = WeightFigures(worst, 0.0, str(self.dtype).removeprefix("torch."))
        self._mark_compared(name, base.nbytes)

    def _compare_unadapted(self, name: str, got: Tensor | QuantisedRows, replaced: bool = True) -> None:
        """Compare a tensor without a delta, rounded once to the export's dtype or quantised.

        replaced: the adapter's replacement of the tensor, where it has one, is what the graph must store.
        """
        if name not in self.checkpoint.tensors:
            self.problems.append(f"{name} is in the graph, and not in the base")
            return
        ref = self.replacements.get(name) if replaced else None
        wanted = (read_tensor(ref) if ref is not None else self._base(name)).reshape(got.shape)
        if isinstance(got, QuantisedRows):
            is_same = not bool(got.excess(wanted.double()).any())
        else:
            is_same = torch.equal(wanted.to(self.dtype), got)
        if not is_same:
            self.problems.append(f"{name} was changed")
        self._mark_compared(name, wanted.nbytes)

    def _mark_compared(self, name: str, size: int) -> None:
        self._compared_tensors.add(name)
        self.compared += 1
        if self.progress is not None:
            self.progress(size)

    def _compare_named(self) -> None:
        """Compare the initialisers whose names are those of the checkpoint's tensors."""
        offset = str(self.checkpoint.config.get("model_type", "")).startswith(OFFSET_NORMS)
        for name in list(self.graph):
            tensor = "model.norm.weight" if name.endswith(".final_norm_layernorm.weight") else name
            if name in self._read_initialisers or tensor not in self.checkpoint.tensors:
                continue
            got = self._read(name)
            if self.factors is None and tensor in self.modules:
                self._compare_adapted(tensor, self.modules[tensor], got, None)
                continue
            if offset and "norm" in tensor:
                stored = self._base(tensor)
                once = (stored.float() + 1).to(self.dtype)
                # An export through a merged model in half precision has rounded the weight before the sum as well.
                twice = (stored.to(self.dtype).float() + 1).to(self.dtype)
                if not bool(((got == once) | (got == twice)).all()):
                    self.problems.append(f"{tensor} was changed")
                self._mark_compared(tensor, got.nbytes)
                continue
            self._compare_unadapted(tensor, got, self.factors is None)

    def _compare_heads(self) -> None:
        """Compare the weights that a switchable adapter replaces."""
        for name, ref in self.replacements.items() if self.factors is not None else ():
            got = self.heads.get(name)
            if got is None:
                self.problems.append(f"{name} of the adapter is missing")
            elif not torch.equal(read_tensor(ref).reshape(got.shape).to(self.dtype), got):
                self.problems.append(f"{name} differs from the adapter's")
            self.compared += 1

    def _base(self, name: str) -> Tensor:
        return read_tensor(self.checkpoint.tensors[name])

    def _read(self, name: str) -> Tensor:
        self._read_initialisers.add(name)
        return read_initialiser(self.graph[name])


def _name(node: ir.Node) -> str:
    """Return the name that the model builder gave a product before it was branched or quantised."""
    return unquantised_name((node.name or "").removeprefix("plain"))


def _open(folder: Path) -> tuple[ir.Model, dict[str, ir.Value]]:
    """Return the graph and its initialisers by name; the weights are memory-mapped."""
    import onnx_ir as ir

    model = ir.load(folder / "model.onnx")
    return model, {name: value for name, value in model.graph.initializers.items() if value.const_value is not None}


def _all_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of a graph and of the subgraphs of its If nodes."""
    import onnx_ir as ir

    return list(ir.traversal.RecursiveGraphIterator(graph))
