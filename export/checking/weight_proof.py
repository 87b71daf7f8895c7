"""Comparison of an export's weights with the adapter as trained, one by one; no model is run.

Exports of the model builder here, traced ones in traced_proof.py.

products    the matrix of every product against the linears of the checkpoint that it computes: the method's formula in
            float64 where an adapter is merged into it, the base's values elsewhere; of quantised matrices, whether each
            code is the nearest one to these values for its scale (packed_products.py)
factors     switchable and batched: W0 + A B, times the row scale, from the tensors of the adapter's file or stack
others      embeddings, norms and biases against the base's

What the graph's metadata says of its products is not believed: the linears that belong to a product follow from the
name that onnxruntime-genai's model builder gives it (targets.py) and from the base's own tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
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

from .packed_products import PackedRows, is_packed, product_name, read_packed
from .stored_adapter import HeldFactors, held_adapter, tensor_of
from .traced_proof import is_traced, verify_traced_weights
from .verdict import find_adapter, header

if TYPE_CHECKING:
    import onnx_ir as ir

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int4": torch.float32}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
FACTOR_ROUNDINGS = 4  # A, B and the scale are rounded once each; their product may be off by as many ulp
OFFSET_NORMS = ("gemma",)  # families whose norms multiply by 1 + weight: the builder stores the sum


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

    Takes and returns what `verification.verify_onnx` does, without logits: "layers" (relative error of dW by weight),
    "compared" (their number, the base's own tensors included), "notes" (initialisers that no tensor of the base
    belongs to), "problems" and "passed".
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
    held = {name for one in layout.targets for name in (one.down_name, one.up_name, one.scale_name)}
    factors, heads = held_adapter(folder, manifest, layout, chosen, graph)
    kept = torch.float16 if manifest.precision == "int4" and manifest.device == "cuda" else DTYPES[manifest.precision]
    proof = _Proof(checkpoint, bound, kept, graph, factors, heads, held, progress)
    proof.run(_all_nodes(model.graph))
    return {
        **header(folder, manifest, chosen, adapter),
        "compared_with": "the method's formula in float64" if adapter else "the base's weights",
        "layers": {key: asdict(value) for key, value in proof.layers.items()},
        "half_precision": None,
        "compared": proof.compared,
        "notes": proof.notes(),
        "problems": proof.problems,
        "passed": not proof.problems,
    }


class _Proof:
    """Collects the comparison of every initialiser of one graph."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        bound: BoundAdapter | None,
        kept: torch.dtype,
        graph: Mapping[str, ir.Value],
        factors: Mapping[str, HeldFactors] | None,  # by target; None: merged into the products
        heads: Mapping[str, Tensor],  # what a switchable adapter replaces, by the checkpoint's names
        held: Collection[str],  # initialisers that hold the adapters of a batched export
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.kept, self.graph, self.factors, self.heads = checkpoint, kept, graph, factors, heads
        self.modules = modules_by_tensor(bound) if bound is not None else {}
        self.replacements = bound.replacements if bound is not None else {}
        self.progress = progress
        self.layers: dict[str, WeightFigures] = {}
        self.problems: list[str] = []
        self.compared = 0
        self._used = set(held)  # initialisers
        self._found: set[str] = set()  # tensors of the checkpoint

    def run(self, nodes: list[ir.Node]) -> None:
        """Compare the products, then every other initialiser, then look for what is missing."""
        products = {_name(node): node for node in nodes if node.op_type in ("MatMul", "Gemm") or is_packed(node)}
        shapes = {name: ref.shape for name, ref in self.checkpoint.tensors.items()}
        for target in decoder_targets([name for name in products if name], shapes, head=True):
            for node in nodes:
                if _name(node) == target.nodes[0]:
                    self._product(target, node)
        self._others()
        self._heads()
        missing = sorted(set(self.checkpoint.tensors) - self._found - {HEAD})
        missing = [name for name in missing if not name.endswith("rotary_emb.inv_freq")]
        if missing:
            self.problems.append(f"{len(missing)} weights of the base are not in the graph, first {missing[0]}")
        lacking = sorted(set(self.modules) - set(self.layers))
        if lacking:
            self.problems.append(f"{len(lacking)} adapted weights are not in the graph, first {lacking[0]}")
        bad = [name for name, one in self.layers.items() if not one.relative_error <= self._bar()]
        if bad:
            text = f"weights with a relative error of dW above {self._bar():.2g}"
            self.problems.append(f"{len(bad)} {text}, first {bad[0]}")
        if not self.compared:
            self.problems.append("nothing was compared: the graph has no product of the base")

    def notes(self) -> list[str]:
        """Return what no tensor of the base stands for: caches of cosines, constants of the builder."""
        rest = sorted(
            name
            for name, value in self.graph.items()
            if name not in self._used and value.const_value is not None and value.const_value.size > 1
        )
        return [f"not compared: {len(rest)} tensors that the builder computes ({', '.join(rest[:4])})"] if rest else []

    def _bar(self) -> float:
        if self.kept == torch.float32:
            return WEIGHT_TOLERANCE
        return FACTOR_ROUNDINGS * torch.finfo(self.kept).eps

    def _product(self, target: Target, node: ir.Node) -> None:
        matrix = read_packed(node, self._read) if is_packed(node) else self._matrix(node)
        if matrix is None:
            self.problems.append(f"{node.name} does not multiply by a stored matrix")
            return
        if tuple(matrix.shape) != (target.n, target.k):
            self.problems.append(f"{node.name} multiplies by {tuple(matrix.shape)} instead of {(target.n, target.k)}")
            return
        for part in target.parts:
            self._weight(f"{part.module}.weight", matrix[part.start : part.start + part.size], target, part.start)
            bias = self.graph.get(f"{_name(node).strip('/').replace('/', '.')[:-7]}.Add.bias")
            if bias is not None and bias.name is not None:
                stated = self._read(bias.name)[part.start : part.start + part.size]
                self._plain(f"{part.module}.bias", stated)

    def _matrix(self, node: ir.Node) -> Tensor | None:
        """Return the matrix (n, k) of a product of floats; None where it is not stored."""
        value = node.inputs[1]
        turned = value is not None and value.producer() is not None
        if turned:
            producer = value.producer()
            value = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
        if value is None or value.name not in self.graph:
            return None
        stored = self._read(value.name)
        return stored if turned else stored.T

    def _weight(self, name: str, got: Tensor | PackedRows, target: Target, start: int) -> None:
        """Compare the rows of one linear, (size, k) as the graph has them, with the checkpoint's and the adapter's."""
        source = name
        if name == HEAD and name not in self.checkpoint.tensors and name not in self.replacements:
            source = EMBEDDINGS  # tied
        items = self.modules.get(source)
        merged = self.factors is None
        if items is None or not merged:
            self._plain(source, got, merged)
        if items is None:
            if self.factors is not None and target.name in self.factors:
                base = self._base(source).double()
                if not torch.equal(self.factors[target.name].apply(base, start), base):
                    self.problems.append(f"{source} is changed by the export, and not by the adapter")
            return
        held = (self.factors or {}).get(target.name)
        change = None if merged else (lambda base: base if held is None else held.apply(base, start))
        self._adapted(source, items, got, change)

    def _adapted(
        self,
        name: str,
        items: Sequence[BoundModule],
        got: Tensor | PackedRows,
        change: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Compare W' with the formula; change: what the export computes from W0, None where `got` is W' itself."""
        base, exact, slack = whole_weight(items)
        half = 0.0
        if change is not None:
            off = (change(base) - exact).abs()
        elif isinstance(got, PackedRows):
            off = got.excess(exact)
        else:
            off = (got.double().reshape(exact.shape) - exact).abs()
            half = torch.finfo(self.kept).eps / 2 if self.kept != torch.float32 else 0.0
        off = (off - half * exact.abs() - (slack if slack is not None else 0.0)).clamp_min(0)
        size = float(torch.linalg.vector_norm(exact - base))
        error = float(torch.linalg.vector_norm(off))
        relative = error / size if size else error
        if relative != relative:
            relative = math.inf
        before = self.layers.get(name)
        worst = max(relative, before.relative_error if before is not None else 0.0)
        self.layers[name] = WeightFigures(worst, 0.0, str(self.kept).removeprefix("torch."))
        self._used_tensor(name, base.nbytes)

    def _plain(self, name: str, got: Tensor | PackedRows, replaced: bool = True) -> None:
        """Compare a tensor that no adapter changes, rounded once to the export's dtype or quantised."""
        if name not in self.checkpoint.tensors:
            self.problems.append(f"{name} is in the graph, and not in the base")
            return
        ref = self.replacements.get(name) if replaced else None
        wanted = (read_tensor(ref) if ref is not None else self._base(name)).reshape(got.shape)
        if isinstance(got, PackedRows):
            is_same = not bool(got.excess(wanted.double()).any())
        else:
            is_same = torch.equal(wanted.to(self.kept), got)
        if not is_same:
            self.problems.append(f"{name} was changed")
        self._used_tensor(name, wanted.nbytes)

    def _used_tensor(self, name: str, size: int) -> None:
        self._found.add(name)
        self.compared += 1
        if self.progress is not None:
            self.progress(size)

    def _others(self) -> None:
        """Compare the initialisers that the builder names after the checkpoint's tensors."""
        offset = str(self.checkpoint.config.get("model_type", "")).startswith(OFFSET_NORMS)
        for name in list(self.graph):
            own = name
            if name.endswith(".final_norm_layernorm.weight"):
                own = "model.norm.weight"
            if name in self._used or own not in self.checkpoint.tensors:
                continue
            got = self._read(name)
            if self.factors is None and own in self.modules:
                self._adapted(own, self.modules[own], got, None)
                continue
            norm = "norm" in own
            if offset and norm:
                stored = self._base(own)
                once = (stored.float() + 1).to(self.kept)
                twice = (stored.to(self.kept).float() + 1).to(self.kept)  # a merged model in half precision lay between
                if not bool(((got == once) | (got == twice)).all()):
                    self.problems.append(f"{own} was changed")
                self._used_tensor(own, got.nbytes)
                continue
            self._plain(own, got, self.factors is None)

    def _heads(self) -> None:
        """Compare the weights that the adapter brings along and the export switches to."""
        for name, ref in self.replacements.items() if self.factors is not None else ():
            held = self.heads.get(name)
            if held is None or not torch.equal(read_tensor(ref).reshape(held.shape).to(self.kept), held):
                self.problems.append(f"{name} of the adapter is {'missing' if held is None else 'another one'}")
            self.compared += 1

    def _base(self, name: str) -> Tensor:
        return read_tensor(self.checkpoint.tensors[name])

    def _read(self, name: str) -> Tensor:
        self._used.add(name)
        return tensor_of(self.graph[name])


def _name(node: ir.Node) -> str:
    """Return the model builder's name of a product."""
    return product_name((node.name or "").removeprefix("plain"))


def _open(folder: Path) -> tuple[ir.Model, dict[str, ir.Value]]:
    """Return the graph, whose weights are mapped and not read, and its initialisers by name."""
    import onnx_ir as ir

    model = ir.load(folder / "model.onnx")
    return model, {name: value for name, value in model.graph.initializers.items() if value.const_value is not None}


def _all_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of a graph and of the branches in it."""
    import onnx_ir as ir

    return list(ir.traversal.RecursiveGraphIterator(graph))
