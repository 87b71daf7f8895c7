"""An adapter whose every name was found in its base: what bind.py makes and everything else works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapter_merge.errors import UnsupportedError
from adapter_merge.methods.adapter import AdaptedModule, Adapter
from adapter_merge.methods.block_edits import BlockEdit, RowRange
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor


@dataclass(frozen=True)
class BoundModule:
    """One adapted module and the weight that it changes."""

    module: AdaptedModule
    weight: TensorRef  # in the base, or saved beside the adapter (a resized embedding)
    transposed: bool = False  # the base stores (in, out), as GPT-2's Conv1D does
    output: str | None = None  # the name to write, where it is not the weight's own (an untied head)
    rows: tuple[int, int] | None = None  # the rows of the weight's 2-D view that are adapted; None: all

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.output or self.weight.name

    def oriented_weight(self) -> Tensor:
        """W0 (out, in) in the base's dtype, read whole; only the adapted rows where they are some of them."""
        ref = self.weight
        if self.rows is not None:
            first, stop = self.rows
            start, size = ref.start, ref.row_bytes
            shape = (stop - first, ref.shape[-1])
            ref = replace(ref, shape=shape, start=start + first * size, stop=start + stop * size)
        weight = read_tensor(ref)
        return weight.T.contiguous() if self.transposed else weight

    def form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """The canonical form for W0 (out, in), on the CPU."""
        return self.module.form(read_tensor, self.oriented_weight, dtype)

    def stored_form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """The canonical form for the weight as the base stores it. Raises UnsupportedError where there is none."""
        edit = self.stored_edit(dtype)
        if not isinstance(edit, CanonicalForm):
            raise UnsupportedError(
                f"{self.name}: this change of the weight has no low-rank form", hint="merge this adapter instead"
            )
        return edit

    def stored_edit(self, dtype: torch.dtype = torch.float32) -> BlockEdit:
        """What is done to the weight as the base stores it."""
        edit = self.module.edit(read_tensor, self.oriented_weight, dtype)
        if self.transposed:
            if not isinstance(edit, CanonicalForm):
                raise UnsupportedError(f"{self.name}: the residual saved beside the adapter is the other way round")
            edit = edit.transposed()
        return edit if self.rows is None else RowRange(edit, *self.rows)


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter with every name found in its base."""

    adapter: Adapter
    base: Checkpoint
    modules: tuple[BoundModule, ...]
    replacements: dict[str, TensorRef]  # base tensor name -> trained tensor
    base_kind: str  # "original" or "residual"
    evidence: str | None = None  # why base_kind is what it is, where that was measured
    copies: Mapping[str, TensorRef] = field(default_factory=dict)  # new name -> base tensor, written as it is
    config_changes: Mapping[str, Any] = field(default_factory=dict)  # what the merged model's config must say


def parameter_of(module: AdaptedModule) -> str:
    """Which tensor of its module is adapted: weight, bias, or a bare parameter."""
    return module.parameter
