"""Comparison of every weight of a traced export (encoders, GPT-2) with the adapter as trained.

The parameters and buffers of a traced graph keep the names that transformers' class gives them. transformers' class is
loaded twice in float64 from the base's files, part by part: with the base's weights, and with the weights that the
method's formula gives (verification/streamed_adapter.py). No model runs.

parameters  each one is stored under its name, as floats or as int8 codes, in the orientation that its uses imply
            (traced_graph.py), and no operator uses it but products, lookups, sums and norms
factors     switchable and batched: the graph computes with (W0 + A B) * s. A, B and s come from the adapter's file or
            from its place in the stack. Every product with A has the input of a product with W0. Heads come from the
            adapter's file
the rest    the graph holds no other floating-point tensor

Of the graph's metadata only the names of the factors are used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.export.engine.providers import graph_file
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.adapter_ids import IDS
from adapter_merge.export.graph.encoder_task import GPT2, is_body
from adapter_merge.export.graph.targets import POSITIONS, Layout, read_layout
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.verification.compare_weights import Progress
from adapter_merge.verification.streamed_adapter import base_parts, formula_parts
from adapter_merge.verification.streamed_model import REST, PartLoader

from .encoder_verification import class_folder
from .parameter_errors import ParameterErrors
from .stored_adapter import ExportedFactors, read_exported_adapter
from .traced_graph import TracedGraph, UnexpectedUse
from .verdict import find_adapter, header, weights_report

NOT_EXPORTED = ("pooler.",)  # modules of a body that its hidden states do not depend on


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
        untrained = base_parts(open_base(place), torch.float64)
        trained = untrained if bound is None else formula_parts(bound, torch.float64)
        graph = TracedGraph(model.graph)
        factors, heads = read_exported_adapter(folder, manifest, layout, chosen, graph.initialisers)
        proof = _Proof(graph, layout, untrained, trained, factors, heads, ParameterErrors(progress))
        proof.check_defaults(manifest.mode)
        proof.compare_parameters(is_body(name_of_class))
        proof.compare_buffers()
        proof.check_result()
    return {
        **header(folder, manifest, chosen, adapter),
        **weights_report(
            adapter is not None, proof.errors.layers, proof.errors.compared, proof.notes(), proof.errors.problems
        ),
    }


class _Proof:
    """The comparison of every tensor of one graph with the model."""

    def __init__(
        self,
        graph: TracedGraph,
        layout: Layout,
        untrained: PartLoader,  # the base
        trained: PartLoader,  # the base with the adapter
        factors: Mapping[str, ExportedFactors] | None,  # by target; None in a merged export
        heads: Mapping[str, Tensor],  # weights that a switchable adapter replaces
        errors: ParameterErrors,
    ) -> None:
        self.graph, self.layout, self.untrained, self.trained = graph, layout, untrained, trained
        self.factors, self.heads, self.errors = factors, heads, errors
        self.targets = {target.name: target for target in layout.targets}

    def check_defaults(self, mode: str) -> None:
        """Add a problem where the graph changes a weight although the caller chooses no adapter."""
        for target in self.targets.values():
            names = (target.down_name, target.up_name, target.scale_name)
            down, up, scale = (self.graph.read_if_stored(name) for name in names)
            if mode == "batched":  # the first place of each stack is that of no adapter
                down, up, scale = (None if stack is None else stack[0] for stack in (down, up, scale))
            factors = [factor for factor in (down, up) if factor is not None and bool(factor.any())]
            if factors or (scale is not None and not bool((scale == 1).all())):
                self.errors.problems.append(f"{target.name} is changed where no adapter is chosen")
        ids = self.graph.read_if_stored(IDS)
        if ids is not None and bool(ids.any()):
            self.errors.problems.append("the graph applies an adapter where the caller chooses none")

    def compare_parameters(self, is_body: bool) -> None:
        """Compare every parameter of the trained model, part by part; is_body: the exported class has no head."""
        for part in (REST, *sorted(self.trained.parts)):
            before = self.untrained.load(part) if part == REST or part in self.untrained.parts else {}
            for name, after in self.trained.load(part).items():
                self._compare_parameter(name, before.get(name), after, is_body)

    def compare_buffers(self) -> None:
        """Compare the model's buffers that the graph stores under their names."""
        for name, buffer in self.trained.model.named_buffers():
            if name in self.graph.initialisers and not self.graph.was_read(name):
                self.errors.compare(name, self.graph.read(name), None, buffer)

    def check_result(self) -> None:
        """Add a problem for errors above the tolerance, for unknown floating-point tensors, and for an empty graph."""
        self.errors.check_tolerance()
        unread = self.graph.unread()
        unknown = [name for name in unread if self.graph.initialisers[name].dtype.is_floating_point()]
        if unknown:
            self.errors.problems.append(
                f"{len(unknown)} tensors in the graph belong to no tensor of the model, first {unknown[0]}"
            )
        if not self.errors.compared:
            self.errors.problems.append("nothing was compared")

    def notes(self) -> list[str]:
        """Return a note on the tensors that were not compared: integers that the trace computed."""
        rest = self.graph.unread()
        return [f"not compared: {len(rest)} constants of the trace ({', '.join(rest[:4])})"] if rest else []

    def _compare_parameter(self, name: str, before: Tensor | None, after: Tensor, is_body: bool) -> None:
        """Compare one parameter; before: the base's (None where the base has none), after: the trained one."""
        # A merge gives DeBERTa's positional queries and keys weights of their own; the base shares the tokens' weights.
        shared = name.replace(".pos_query_proj.", ".query_proj.").replace(".pos_key_proj.", ".key_proj.")
        if before is None and shared != name:
            before = self.untrained.load(self.untrained.part_of(shared)).get(shared)
        names = [name, *self._tied_names(name), *(() if self.factors is None else (shared,))]
        stored_as = next((other for other in names if self.graph.has_parameter(other)), None)
        if stored_as is None:
            if not (is_body and name.startswith(NOT_EXPORTED)):
                self.errors.problems.append(f"{name} is not in the graph")
            return
        try:
            got = self.graph.read_parameter(stored_as, self._is_conv1d(stored_as))
        except UnexpectedUse as error:
            self.errors.problems.append(str(error))
            return
        if self.factors is None:
            self.errors.compare(name, got, before, after)
            return
        if before is not None:
            self.errors.compare(stored_as, got, before, before)
        if name in self.heads:
            self.errors.compare(name, self.heads[name], before, after, self.layout.dtype)
        else:
            self._compare_computed(name, stored_as, before, after)

    def _compare_computed(self, name: str, stored_as: str, before: Tensor | None, after: Tensor) -> None:
        """Compare the weight that the graph computes from the base's weight and the adapter's factors."""
        if before is None:
            self.errors.problems.append(f"{name} is neither in the base nor in the adapter's file")
            return
        factors = {target: (self.factors or {}).get(target) for target in self._targets_of(name, stored_as)}
        if not any(value is not None for value in factors.values()):
            if not torch.equal(before, after):
                self.errors.problems.append(f"{name} is changed by the adapter, and not by the export")
            return
        is_conv1d = self._is_conv1d(stored_as)
        for target, value in factors.items():
            weight = before.T if is_conv1d else before  # (out, in)
            changed = weight if value is None else value.apply(weight, 0)
            self.errors.compare(name, changed.T if is_conv1d else changed, before, after, self.layout.dtype)
            if value is not None and not self.graph.multiplies_the_same(self.targets[target].down_name, stored_as):
                self.errors.problems.append(f"the factors of {target} are not beside its product")

    def _targets_of(self, name: str, stored_as: str) -> list[str]:
        """Return the targets whose products use the parameter: two where a DeBERTa shares it for positions."""
        module, _, kind = stored_as.rpartition(".")
        targets = [target for target in (module, module + POSITIONS) if target in self.targets and kind == "weight"]
        if len(targets) == 2:
            if ".pos_query_proj." in name:
                return targets[1:]
            if name.replace(".query_proj.", ".pos_query_proj.") in self.trained.model.state_dict():
                return targets[:1]
        return targets

    def _is_conv1d(self, name: str) -> bool:
        """Return True for the weight (in, out) of GPT-2's Conv1D; a Linear's is (out, in)."""
        module, _, kind = name.rpartition(".")
        return kind == "weight" and type(self.trained.model.get_submodule(module)).__name__ == "Conv1D"

    def _tied_names(self, name: str) -> list[str]:
        """Return the other names of a tied parameter."""
        tied: Mapping[str, str] = self.trained.model.all_tied_weights_keys
        source = tied.get(name, name)
        return [other for other in (source, *(key for key, value in tied.items() if value == source)) if other != name]
