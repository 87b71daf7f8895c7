"""Comparison of the weights of a traced export (encoders, GPT-2) with the adapter as trained, one by one.

The traced graph keeps the names that transformers' class gives its parameters and buffers. They are held against that
class, read twice in float64 from the base's files, part by part: as the base is, and with the method's formula in every
weight that an adapter changes (verification/streamed_adapter.py). No model is run.

parameters  each is stored under its name, in the orientation that its uses say, as itself or as int8 codes
            (packed_matrices.py), and used by nothing but products, lookups, sums and norms
factors     switchable and batched: (W0 + A B) * s, from the adapter's file or slot, where the graph adds A's product to
            a product of this weight with the same input; heads from the adapter's file
the rest    no other tensor of floating numbers may lie in the graph

What the graph's metadata says is not believed beyond the names of the factors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.export.engine.providers import graph_file
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.adapter_ids import IDS
from adapter_merge.export.graph.encoder_task import GPT2, is_body
from adapter_merge.export.graph.targets import POSITIONS, Layout, Target, read_layout
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.verification.compare_weights import WEIGHT_TOLERANCE, Progress, WeightFigures
from adapter_merge.verification.streamed_adapter import base_parts, formula_parts
from adapter_merge.verification.streamed_model import REST, PartLoader

from .encoder_verification import class_folder
from .packed_matrices import ENDINGS, PackedMatrix, read_packed_matrix
from .stored_adapter import HeldFactors, held_adapter, tensor_of
from .verdict import find_adapter, header

if TYPE_CHECKING:
    import onnx_ir as ir

USES = {  # operator, input: what a parameter may be used by, beside products
    ("Gather", 0),
    ("Add", 0),
    ("Add", 1),
    ("LayerNormalization", 0),
    ("LayerNormalization", 1),
    ("LayerNormalization", 2),
}
UNUSED = ("pooler.",)  # modules of a body that its hidden states do not need
TINY = 6e-8  # the least number that onnxruntime's float16 converter writes for what is not zero
ROUNDINGS = 4  # of float16: A, B and the scale are rounded once each, see weight_proof.py


def is_traced(manifest: Manifest) -> bool:
    """Return True for an export of torch.onnx."""
    return manifest.kind != "decoder" or manifest.options.get("class") == GPT2


def verify_traced_weights(
    base: str | Path,
    adapter: str | Path | None,
    folder: Path,
    manifest: Manifest,
    *,
    name: str | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare every weight of the export in `folder` with `adapter` on `base`; see weight_proof.verify_weights."""
    import onnx_ir as ir

    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    bound: Any = open_pair(base, adapter, base_kind, options) if adapter is not None else None
    checkpoint = open_base(base)
    file = graph_file(folder)
    model = ir.load(file)
    layout = read_layout(model.metadata_props, str(file))
    name_of_class = str(manifest.options.get("class", GPT2))
    with tempfile.TemporaryDirectory(prefix="adapter-merge-weights-") as temporary:
        place = class_folder(checkpoint, Path(temporary), name_of_class, bound)
        if bound is not None and place != checkpoint.folder:
            bound = open_pair(place, bound.adapter.folder, bound.base_kind, options)
        plain = base_parts(open_base(place), torch.float64)
        trained = plain if bound is None else formula_parts(bound, torch.float64)
        proof = _Proof(model.graph, layout, plain, trained, is_body(name_of_class), progress)
        held = held_adapter(folder, manifest, layout, chosen, proof.stored)
        proof.run(manifest.mode, *held)
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
    """Collects the comparison of every tensor of one graph."""

    def __init__(
        self,
        graph: ir.Graph,
        layout: Layout,
        plain: PartLoader,  # the base
        trained: PartLoader,  # the base with the adapter
        body: bool,  # the class has no head
        progress: Progress | None,
    ) -> None:
        self.stored = {name: value for name, value in graph.initializers.items() if value.const_value is not None}
        self.layout, self.plain, self.trained, self.body, self.progress = layout, plain, trained, body, progress
        self.targets = {target.name: target for target in layout.targets}
        self.layers: dict[str, WeightFigures] = {}
        self.problems: list[str] = []
        self.compared = 0
        self._used: set[str] = set()  # initialisers
        self._factors: Mapping[str, HeldFactors] = {}
        self._heads: Mapping[str, Tensor] = {}
        self._merged = True

    def run(self, mode: str, factors: Mapping[str, HeldFactors] | None, heads: Mapping[str, Tensor]) -> None:
        """Compare the parameters, then the buffers, then look for what else the graph holds."""
        self._merged, self._factors, self._heads = mode == "merged", factors or {}, heads
        for target in self.targets.values():
            self._defaults(target, mode)
        ids = self._maybe(IDS)
        if ids is not None and bool(ids.any()):
            self.problems.append("an adapter is chosen where the caller chooses none")
        for part in (REST, *sorted(self.trained.parts)):
            before = self.plain.load(part) if part == REST or part in self.plain.parts else {}
            for name, after in self.trained.load(part).items():
                self._parameter(name, before.get(name), after)
        for name, buffer in self.trained.model.named_buffers():
            if name in self.stored and name not in self._used:
                self._compare(name, self._read(name), None, buffer)
        bad = [name for name, one in self.layers.items() if not one.relative_error <= _bar(one.dtype)]
        if bad:
            self.problems.append(f"{len(bad)} weights with a relative error of dW above the bar, first {bad[0]}")
        unknown = [name for name in self._rest() if self.stored[name].dtype.is_floating_point()]
        if unknown:
            self.problems.append(
                f"{len(unknown)} tensors in the graph belong to no tensor of the model, first {unknown[0]}"
            )
        if not self.compared:
            self.problems.append("nothing was compared")

    def notes(self) -> list[str]:
        """Return what was not compared: whole numbers that the trace computed."""
        rest = self._rest()
        return [f"not compared: {len(rest)} constants of the trace ({', '.join(rest[:4])})"] if rest else []

    def _rest(self) -> list[str]:
        return sorted(
            name
            for name, value in self.stored.items()
            if name not in self._used and value.const_value is not None and value.const_value.size > 1
        )

    def _parameter(self, name: str, before: Tensor | None, after: Tensor) -> None:
        """Compare one parameter of the model: `before` as the base has it (None: it has none), `after` as trained."""
        shared = name.replace(".pos_query_proj.", ".query_proj.").replace(".pos_key_proj.", ".key_proj.")
        if before is None and shared != name:  # DeBERTa: the base has one weight for tokens and positions
            before = self._base_of(shared)
        names = [name, *self._twins(name), *(() if self._merged else (shared,))]
        place = next((other for other in names if self._has(other)), None)
        if place is None:
            if not (self.body and name.startswith(UNUSED)):
                self.problems.append(f"{name} is not in the graph")
            return
        got = self._matrix(place)
        if got is None:
            return
        if self._merged:
            self._compare(name, got, before, after)
            return
        if before is not None:
            self._compare(place, got, before, before)
        if name in self._heads:
            self._compare(name, self._heads[name], before, after, adapted=True)
        else:
            self._switched(name, place, before, after)

    def _switched(self, name: str, place: str, origin: Tensor | None, after: Tensor) -> None:
        """Compare what the graph computes from the base's weight and the adapter's factors."""
        module, _, kind = place.rpartition(".")
        targets = [target for target in (module, module + POSITIONS) if target in self.targets and kind == "weight"]
        if len(targets) == 2:
            if ".pos_query_proj." in name:
                targets = targets[1:]
            elif name.replace(".query_proj.", ".pos_query_proj.") in self.trained.model.state_dict():
                targets = targets[:1]
        factors = [(target, self._factors.get(target)) for target in targets]
        if origin is None:
            self.problems.append(f"{name} is neither the base's nor in the adapter's file")
            return
        if not any(held is not None for _, held in factors):
            if not torch.equal(origin, after):
                self.problems.append(f"{name} is changed by the adapter, and not by the export")
            return
        turned = self._is_turned(place)
        for target, held in factors:
            weight = origin.T if turned else origin
            changed = weight if held is None else held.apply(weight, 0)
            self._compare(name, changed.T if turned else changed, origin, after, adapted=True)
            if held is not None and not self._is_wired(target, place):
                self.problems.append(f"the factors of {target} are not beside its product")

    def _compare(
        self, name: str, got: Tensor | PackedMatrix, before: Tensor | None, after: Tensor, adapted: bool = False
    ) -> None:
        """Compare a stored tensor with `after`; by the error of dW where the adapter has a part in it."""
        self.compared += 1
        if self.progress is not None:
            self.progress(after.nbytes)
        if tuple(got.shape) != tuple(after.shape):
            self.problems.append(f"{name} has the shape {tuple(got.shape)} instead of {tuple(after.shape)}")
            return
        off, dtype = _off(got, after, self._dtype() if adapted else None)
        changes = before is not None and (before.shape != after.shape or not torch.equal(before, after))
        if not adapted and not changes:
            if bool(off.any()):
                self.problems.append(f"{name} was changed")
            return
        size = (
            float(torch.linalg.vector_norm(after - before)) if before is not None and before.shape == after.shape else 0
        )
        size = size or float(torch.linalg.vector_norm(after))
        error = float(torch.linalg.vector_norm(off)) / (size or 1.0)
        earlier = self.layers.get(name)
        worst = max(error if error == error else float("inf"), earlier.relative_error if earlier is not None else 0.0)
        self.layers[name] = WeightFigures(worst, 0.0, dtype)

    def _defaults(self, target: Target, mode: str) -> None:
        """Look at what a target adds where no adapter is chosen: nothing, times one."""
        down, up, scale = (self._maybe(name) for name in (target.down_name, target.up_name, target.scale_name))
        if mode == "batched":  # slot 0
            down, up, scale = (None if stack is None else stack[0] for stack in (down, up, scale))
        adds = [tensor for tensor in (down, up) if tensor is not None and bool(tensor.any())]
        if adds or (scale is not None and not bool((scale == 1).all())):
            self.problems.append(f"{target.name} is changed where no adapter is chosen")

    def _matrix(self, name: str) -> Tensor | PackedMatrix | None:
        """Return a parameter as the model has it; None, with a problem, where the graph does something else with it."""
        turned = self._is_turned(name)
        if name in self.stored:
            value, got = self.stored[name], self._read(name)
            uses = list(value.uses())
            forms = {form for node, index in uses for form in _forms(node, index)}
        else:
            packed = read_packed_matrix(name, self._maybe)
            assert packed is not None
            codes = next(
                self.stored[f"{name}{ending}_quantized"]
                for ending in ENDINGS
                if f"{name}{ending}_quantized" in self.stored
            )
            got = packed  # type: ignore[assignment]
            uses = list(codes.uses())
            known = {("MatMulInteger", 1): "factor", ("Gather", 0): "rows"}
            forms = {known.get((node.op_type, index), node.op_type) for node, index in uses}
        unknown = forms - {"factor", "rows", "turned"}
        if unknown or not uses:
            self.problems.append(f"{name} is used by {', '.join(sorted(unknown)) or 'nothing'}")
            return None
        if "factor" in forms and len(forms) > 1 and not turned:
            self.problems.append(f"{name} is used as itself and transposed")
            return None
        if turned and "turned" in forms:
            self.problems.append(f"{name} is used transposed")
            return None
        return got.T if "factor" in forms and not turned else got

    def _is_turned(self, name: str) -> bool:
        """Return True for the weight (in, out) of GPT-2's Conv1D; a Linear's is (out, in)."""
        module, _, kind = name.rpartition(".")
        return kind == "weight" and type(self.trained.model.get_submodule(module)).__name__ == "Conv1D"

    def _is_wired(self, target: str, name: str) -> bool:
        """Return True when A of the target multiplies what the weight `name` multiplies, wherever it is used."""
        down = self.stored[self.targets[target].down_name]
        names = [name, *(f"{name}{ending}_quantized" for ending in ENDINGS)]
        inputs = {id(value) for stored in names if stored in self.stored for value in _multiplied(self.stored[stored])}
        added = [id(value) for value in _multiplied(down)]
        return bool(added) and inputs.issuperset(added)

    def _base_of(self, name: str) -> Tensor | None:
        return self.plain.load(self.plain.part_of(name)).get(name)

    def _twins(self, name: str) -> list[str]:
        """Return the other names of a tied parameter."""
        tied: Mapping[str, str] = self.trained.model.all_tied_weights_keys
        source = tied.get(name, name)
        return [other for other in (source, *(key for key, value in tied.items() if value == source)) if other != name]

    def _has(self, name: str) -> bool:
        return name in self.stored or any(f"{name}{ending}_quantized" in self.stored for ending in ENDINGS)

    def _dtype(self) -> str:
        return self.layout.dtype

    def _maybe(self, name: str) -> Tensor | None:
        return self._read(name) if name in self.stored else None

    def _read(self, name: str) -> Tensor:
        self._used.add(name)
        return tensor_of(self.stored[name])


def _off(got: Tensor | PackedMatrix, after: Tensor, dtype: str | None) -> tuple[Tensor, str]:
    """Return by how much each value is off beyond one rounding to its dtype, and the dtype's name.

    dtype: of the parts that `got` was computed from, where it was computed.
    """
    exact = after.double()
    if isinstance(got, PackedMatrix):
        return got.excess(exact), "int8"
    off = (got.double() - exact).abs()
    if dtype is not None and got.dtype == torch.float64:
        return off, dtype
    if got.dtype.is_floating_point:
        off -= torch.finfo(got.dtype).eps / 2 * exact.abs()
        if got.dtype == torch.float16:
            off -= TINY
    return off.clamp_min(0), str(got.dtype).removeprefix("torch.")


def _bar(dtype: str) -> float:
    return ROUNDINGS * torch.finfo(torch.float16).eps if dtype == "float16" else WEIGHT_TOLERANCE


def _forms(node: ir.Node, index: int) -> set[str]:
    """Return how a node uses a parameter: as a product's factor, transposed for one, or by rows; else its operator."""
    key = (str(node.op_type), index)
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    if key == ("MatMul", 1):
        return {"factor"}
    if key == ("Gemm", 1) and values.get("alpha", 1.0) == 1.0 and not values.get("transA", 0):
        return {"turned" if values.get("transB", 0) else "factor"}
    if key == ("Gemm", 2) and values.get("beta", 1.0) == 1.0:
        return {"rows"}
    if key == ("Transpose", 0):
        uses = list(node.outputs[0].uses())
        fine = list(values.get("perm", ())) == [1, 0] and uses and all(_forms(*use) == {"factor"} for use in uses)
        return {"turned" if fine else "Transpose"}
    return {"rows"} if key in USES else {f"{key[0]} (input {index})"}


def _multiplied(value: ir.Value) -> list[ir.Value]:
    """Return what a matrix is multiplied by in each product that uses it; what whole numbers were made of."""
    found = []
    for node, index in value.uses():
        if node.op_type in ("Transpose", "Gather") and index == 0:
            found += _multiplied(node.outputs[0])
        elif index == 1 and node.op_type in ("MatMul", "Gemm", "MatMulInteger"):
            x = node.inputs[0]
            maker = x.producer() if x is not None else None
            if maker is not None and maker.op_type == "DynamicQuantizeLinear":
                x = maker.inputs[0]
            if x is not None:
                found.append(x)
    return found
