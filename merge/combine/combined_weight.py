"""The combination of all changes that several adapters make to one tensor, as one edit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.binding.bound import BoundModule
from adapter_merge.methods.adapter import ModuleDefaults, Reader, Weight
from adapter_merge.methods.block_edits import BlockEdit, Replaced, apply_edit, chain_edits
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.methods.lora import BiasModule, ExpertModule, LoraModule, RowSliceModule
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .delta_ops import Settings, WeightedEdit, combine_edits, combine_forms, key_of


@dataclass(frozen=True)
class Share:
    """The change of one tensor by one adapter, with the weight and density of the recipe."""

    adapter: str
    weight: float
    density: float
    modules: tuple[BoundModule, ...]
    replacement: TensorRef | None = None

    def edit(self, dtype: torch.dtype) -> BlockEdit:
        """Return the whole change of the stored tensor by this adapter, in `dtype`."""
        edits: list[BlockEdit] = [Replaced(self.replacement)] if self.replacement is not None else []
        return chain_edits([*edits, *(module.stored_edit(dtype) for module in self.modules)])

    @property
    def is_matrix(self) -> bool:
        """True for one whole adapted weight matrix: not a head, bias, expert or trained token."""
        if self.replacement is not None or len(self.modules) != 1 or self.modules[0].rows is not None:
            return False
        if self.modules[0].module.parameter == "bias":
            return False
        return not isinstance(self.modules[0].module, TokenModule | BiasModule | ExpertModule | RowSliceModule)

    @property
    def has_form(self) -> bool:
        """True when low-rank factors and a row scale describe the whole change."""
        module = self.modules[0].module if self.is_matrix else None
        if module is None or isinstance(module, PeftLayerModule) or module.frozen is not None:
            return False
        scaled = module.magnitude is not None or module.own_magnitude
        return not (scaled and (module.magnitude_dim == 1 or module.embedding))


@dataclass(frozen=True)
class CombinedWeight(ModuleDefaults):
    """One tensor that one or more adapters change; an `AdaptedModule`."""

    tensor: str  # the output tensor's name, which also seeds its random numbers
    shape: tuple[int, int]  # (out, in); (1, n) for a vector
    shares: tuple[Share, ...]  # in the recipe's order
    settings: Settings
    in_turn: bool = False

    @property
    def name(self) -> str:
        return self.tensor.removesuffix(".weight")

    @property
    def rank(self) -> int:
        return min(sum(module.module.rank for share in self.shares for module in share.modules), *self.shape)

    @property
    def factor_rank(self) -> int:
        return sum(module.module.factor_rank for share in self.shares for module in share.modules)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        refs = [ref for share in self.shares for module in share.modules for ref in module.module.refs]
        return (*refs, *(share.replacement for share in self.shares if share.replacement is not None))

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def share_count(self) -> int:
        return len(self.shares)

    @property
    def embedding(self) -> bool:
        modules = [module.module for share in self.shares for module in share.modules]
        return any(isinstance(module, LoraModule) and module.embedding for module in modules)

    @property
    def is_matrix(self) -> bool:
        """True when low-rank factors can hold the change, exactly or truncated."""
        return all(share.is_matrix for share in self.shares)

    @property
    def is_linear(self) -> bool:
        """True when the change is the weighted sum of the adapters' deltas."""
        if self.in_turn:
            return len(self.shares) == 1
        keeps_all = self.settings.gamma == 0 and all(share.density >= 1 for share in self.shares)
        return keeps_all and (not self.settings.elects or len(self.shares) == 1)

    @property
    def has_form(self) -> bool:
        """True when `form` gives the whole change: a linear combination without scales of input columns."""
        return self.is_linear and all(share.has_form for share in self.shares)

    def parts(self, edits: list[BlockEdit]) -> list[WeightedEdit]:
        """Pair each share with its edit, in order, for `combine_edits`."""
        return [
            WeightedEdit(edit, share.weight, share.density, key_of(self.settings.seed, share.adapter, self.tensor))
            for edit, share in zip(edits, self.shares, strict=True)
        ]

    def stored_edit(self, dtype: torch.dtype) -> BlockEdit:
        """Return the combined change of the stored tensor, in `dtype`."""
        edits = [share.edit(dtype) for share in self.shares]
        edit = chain_edits(edits) if self.in_turn else combine_edits(self.parts(edits), self.settings)
        assert edit is not None, "tensors without a change have no CombinedWeight"
        return edit

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the linear combination on W0 (out, in), with row scales, without the rounding of residuals."""
        assert self.has_form, "the caller must use the dense delta"
        forms = [share.modules[0].form(dtype) for share in self.shares]
        return combine_forms(forms, [share.weight for share in self.shares], weight().to(dtype))

    @property
    def is_rounded(self) -> bool:
        """True when a residual that was rounded to half precision is part of the change; `form` lacks that rounding."""
        modules = [module for share in self.shares for module in share.modules]
        initial = [(module.module.initial, module.weight.dtype) for module in modules]
        return any(entry is not None and (entry.dtype or stored) in ("BF16", "F16") for entry, stored in initial)


@dataclass(frozen=True)
class CombinedModule(BoundModule):
    """A `CombinedWeight` bound to the base tensor that it changes."""

    @property
    def combination(self) -> CombinedWeight:
        assert isinstance(self.module, CombinedWeight)
        return self.module

    def stored_edit(self, dtype: torch.dtype = torch.float32) -> BlockEdit:
        return self.combination.stored_edit(dtype)

    def dense_delta(self, device: torch.device) -> Tensor:
        """Return dW (out, in) in float64 on `device`, for any method."""
        stored = read_tensor(self.weight).to(device=device, dtype=torch.float64)
        delta = apply_edit(self.stored_edit(torch.float64).to(device), stored).sub_(stored)
        return delta.T.contiguous() if self.transposed else delta

    def merged_weight(self) -> Tensor:
        """Return W' in float32, so that a trained head in a PEFT folder keeps its precision on a bfloat16 base."""
        stored = read_tensor(self.weight)
        rows = stored.reshape(1, -1) if stored.dim() < 2 else stored
        after = apply_edit(self.stored_edit(torch.float64), rows.to(torch.float64))
        return after.to(torch.float32).reshape(stored.shape)
