"""Bound adapters: the result of bind.py, with the stored weight of every module. All later steps use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapter_merge.errors import Problem, UnsupportedError
from adapter_merge.methods.adapter import AdaptedModule, Adapter
from adapter_merge.methods.block_edits import BlockEdit, RowRange, WholeReplaced
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor


@dataclass(frozen=True)
class BoundModule:
    """One adapted module and the stored weight that it changes."""

    module: AdaptedModule
    weight: TensorRef  # in the base, or saved beside the adapter (a resized embedding)
    transposed: bool = False  # the base stores (in, out), as GPT-2's Conv1D does
    output: str | None = None  # the output tensor's name, where it differs from the weight's (an untied head)
    rows: tuple[int, int] | None = None  # the rows of the weight's 2-D view that are adapted; None: all

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.output or self.weight.name

    def oriented_weight(self) -> Tensor:
        """Read W0 (out, in) in the base's dtype: the whole weight, or its adapted rows where `rows` is set."""
        ref = self.weight
        if self.rows is not None:
            first, stop = self.rows
            start, size = ref.start, ref.row_bytes
            shape = (stop - first, ref.shape[-1])
            ref = replace(ref, shape=shape, start=start + first * size, stop=start + stop * size)
        weight = read_tensor(ref)
        return weight.T.contiguous() if self.transposed else weight

    def form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """Return the canonical form for W0 (out, in) in `dtype`, on the CPU."""
        return self.module.form(read_tensor, self.oriented_weight, dtype)

    def stored_form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """Return the canonical form for the weight as stored. Raises UnsupportedError where there is none."""
        edit = self.stored_edit(dtype)
        if not isinstance(edit, CanonicalForm):
            raise UnsupportedError(
                f"{self.name}: this change of the weight has no low-rank form", hint="merge this adapter instead"
            )
        return edit

    def stored_edit(self, dtype: torch.dtype = torch.float32) -> BlockEdit:
        """Return the change of the weight as stored by the base, in `dtype`."""
        edit = self.module.edit(read_tensor, self.oriented_weight, dtype)
        if self.transposed:
            if not isinstance(edit, CanonicalForm | WholeReplaced):
                raise UnsupportedError(
                    f"{self.name}: the residual saved beside the adapter is (out, in), and the base stores (in, out)"
                )
            edit = edit.transposed()
        return edit if self.rows is None else RowRange(edit, *self.rows)


@dataclass(frozen=True)
class Origin:
    """Evidence of the base that an adapter was trained on, compared with the base that it is bound to."""

    findings: tuple[str, ...] = ()  # what agrees with the base, as sentences
    contradictions: tuple[Problem, ...] = ()  # evidence of another base, or of a false statement about this base
    doubts: tuple[str, ...] = ()  # differences that also occur on the right base

    def __add__(self, other: Origin) -> Origin:
        return Origin(
            self.findings + other.findings, self.contradictions + other.contradictions, self.doubts + other.doubts
        )

    @property
    def text(self) -> str:
        """All evidence as one line."""
        contradictions = tuple(problem.cause for problem in self.contradictions)
        return "; ".join((*contradictions, *self.doubts, *self.findings)) or UNKNOWN_ORIGIN


UNKNOWN_ORIGIN = "shapes fit; the files do not show which base it was trained on"


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter bound to a base: the stored weight of every module and the tensor of every replacement are known."""

    adapter: Adapter
    base: Checkpoint
    modules: tuple[BoundModule, ...]
    replacements: dict[str, TensorRef]  # base tensor name -> trained tensor
    base_kind: str  # "original" or "residual"
    evidence: str | None = None  # the measurement that decided base_kind, as a sentence
    copies: Mapping[str, TensorRef] = field(default_factory=dict)  # new tensor name -> base tensor to copy
    config_changes: Mapping[str, Any] = field(default_factory=dict)  # changed keys of the merged model's config
    origin: Origin = Origin()  # evidence of the base that the adapter was trained on
