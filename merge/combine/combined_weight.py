"""One tensor that several adapters change: what each does to it, and their combination as one edit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.binding.bound import BoundModule
from adapter_merge.methods.adapter import ModuleDefaults, Reader, Weight
from adapter_merge.methods.block_edits import BlockEdit, Replaced, applied, in_turn
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.methods.lora import BiasModule, ExpertModule, LoraModule, RowSliceModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .delta_ops import Settings, WeightedEdit, combined, combined_form, key_of


@dataclass(frozen=True)
class Share:
    """What one adapter does to one tensor, and how much of it is taken."""

    adapter: str
    weight: float
    density: float
    modules: tuple[BoundModule, ...]
    replacement: TensorRef | None = None

    def edit(self, dtype: torch.dtype) -> BlockEdit:
        """The adapter's whole effect on the tensor, as the base stores it."""
        edits: list[BlockEdit] = [Replaced(self.replacement)] if self.replacement is not None else []
        return in_turn([*edits, *(module.stored_edit(dtype) for module in self.modules)])

    @property
    def is_matrix(self) -> bool:
        """True for one adapted weight matrix, whole: no head, bias, expert or trained token."""
        if self.replacement is not None or len(self.modules) != 1 or self.modules[0].rows is not None:
            return False
        return not isinstance(self.modules[0].module, TokenModule | BiasModule | ExpertModule | RowSliceModule)

    @property
    def has_form(self) -> bool:
        """True where factors and scales of output rows say all of it."""
        module = self.modules[0].module if self.is_matrix else None
        if module is None or module.frozen is not None:
            return False
        scaled = module.magnitude is not None or module.own_magnitude
        return not (scaled and (module.magnitude_dim == 1 or module.embedding))


@dataclass(frozen=True)
class CombinedWeight(ModuleDefaults):
    """One tensor that one or more adapters change: an AdaptedModule."""

    tensor: str  # the output tensor's name, which the random numbers are drawn for
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
        found = [ref for share in self.shares for module in share.modules for ref in module.module.refs]
        return (*found, *(share.replacement for share in self.shares if share.replacement is not None))

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
        """True where a LoRA can hold the change, at least truncated."""
        return all(share.is_matrix for share in self.shares)

    @property
    def is_linear(self) -> bool:
        """True when the change is the weighted sum of the adapters' deltas."""
        if self.in_turn:
            return len(self.shares) == 1
        whole = self.settings.gamma == 0 and all(share.density >= 1 for share in self.shares)
        return whole and (not self.settings.elects or len(self.shares) == 1)

    @property
    def has_form(self) -> bool:
        """True where `form` gives all of it: a linear combination without scales of input columns."""
        return self.is_linear and all(share.has_form for share in self.shares)

    def parts(self, edits: list[BlockEdit]) -> list[WeightedEdit]:
        """The shares as what `combined` takes; `edits` are theirs, in their order."""
        return [
            WeightedEdit(edit, share.weight, share.density, key_of(self.settings.seed, share.adapter, self.tensor))
            for edit, share in zip(edits, self.shares, strict=True)
        ]

    def stored_edit(self, dtype: torch.dtype) -> BlockEdit:
        """What is done to the tensor as the base stores it."""
        edits = [share.edit(dtype) for share in self.shares]
        edit = in_turn(edits) if self.in_turn else combined(self.parts(edits), self.settings)
        assert edit is not None, "tensors that nothing changes are left out"
        return edit

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """The linear combination on W0 (out, in), row scales included; roundings of residuals are not in it."""
        assert self.has_form, "the caller takes the dense delta"
        forms = [share.modules[0].form(dtype) for share in self.shares]
        return combined_form(forms, [share.weight for share in self.shares], weight().to(dtype))

    @property
    def is_rounded(self) -> bool:
        """True when a residual that was rounded to half precision is part of the change: `form` then lacks that."""
        modules = [module for share in self.shares for module in share.modules]
        initial = [(module.module.initial, module.weight.dtype) for module in modules]
        return any(one is not None and (one.dtype or own) in ("BF16", "F16") for one, own in initial)


@dataclass(frozen=True)
class CombinedModule(BoundModule):
    """A `CombinedWeight` and its tensor."""

    @property
    def combination(self) -> CombinedWeight:
        assert isinstance(self.module, CombinedWeight)
        return self.module

    def stored_edit(self, dtype: torch.dtype = torch.float32) -> BlockEdit:
        return self.combination.stored_edit(dtype)

    def dense_delta(self, device: torch.device) -> Tensor:
        """dW (out, in) in float64; of any method, whole."""
        stored = read_tensor(self.weight).to(device=device, dtype=torch.float64)
        delta = applied(self.stored_edit(torch.float64).to(device), stored).sub_(stored)
        return delta.T.contiguous() if self.transposed else delta

    def whole(self) -> Tensor:
        """W' in float32, whatever the base is stored in: a trained head keeps its own precision in a PEFT folder."""
        stored = read_tensor(self.weight)
        rows = stored.reshape(1, -1) if stored.dim() < 2 else stored
        after = applied(self.stored_edit(torch.float64), rows.to(torch.float64))
        return after.to(torch.float32).reshape(stored.shape)
