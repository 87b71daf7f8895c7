"""Factors of parameters that PEFT adapts as target_parameters: stacked experts (E, out, in), and bare matrices.

    <module>.lora_A.weight (E r, in), expert by expert; .lora_B.weight (out, r E), the expert as the fastest index
    W'_e = W_e + B_e A_e, transposed for classes whose is_transposed says that they store (E, in, out)

That is the orientation of PEFT from 0.19.1 on (ParamWrapper.get_delta_weight); factors in an older one are turned. The
factors are those that were trained, with their scale in B: exact, never truncated. A bare matrix has E = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.binding.embeddings import text_config
from adapter_merge.binding.experts import TRANSPOSED_EXPERTS
from adapter_merge.formats.peft.tensors import PREFIX
from adapter_merge.methods.adapter import AdaptedModule, Adapter
from adapter_merge.methods.lora import ExpertModule, LoraModule, StackModule
from adapter_merge.storage.tensor_io import read_tensor

from .certificate import LayerFigures, low_rank_errors

PEFT_VERSION = "0.19.1"  # the first with the orientation that is written


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """Factors of one parameter as written, with a scale of 1."""

    module: str  # the module that owns the parameter
    parameter: str
    depth: int  # the number of PEFT's wrappers of the same module around this one
    rank: int  # of one expert
    a: Tensor  # (E r, in) float32
    b: Tensor  # (out, r E) float32
    figures: LayerFigures  # of all experts: the largest errors

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.parameter}"

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in adapter_model.safetensors."""
        stem = f"{PREFIX}{self.module}{'.base_layer' * self.depth}"
        return {f"{stem}.lora_A.weight": self.a, f"{stem}.lora_B.weight": self.b}


def is_of_stack(module: AdaptedModule, opened: Adapter) -> bool:
    """Return True for a bound module that comes from an entry of target_parameters."""
    if isinstance(module, ExpertModule):
        return True
    factors = {stack.a.name for stack in opened.modules if isinstance(stack, StackModule)}
    return isinstance(module, LoraModule) and module.a.name in factors


def expert_factors(opened: Adapter, bound: BoundAdapter) -> list[ExpertFactors]:
    """Return the factors of every parameter that `opened` adapts by target_parameters."""
    first: dict[str, BoundModule] = {}
    for item in bound.modules:
        if isinstance(item.module, ExpertModule | LoraModule):
            first.setdefault(item.module.a.name, item)
    turned = text_config(bound.base.config).get("model_type") in TRANSPOSED_EXPERTS
    stacks = [module for module in opened.modules if isinstance(module, StackModule)]
    return [_factors(stack, first[stack.a.name].module, turned) for stack in stacks]


def _factors(stack: StackModule, module: AdaptedModule, transposed: bool) -> ExpertFactors:
    """Return the factors of one parameter, turned where the class stores experts otherwise than they were trained."""
    assert isinstance(module, ExpertModule | LoraModule)
    experts = module.experts if isinstance(module, ExpertModule) else 1
    rank = stack.a.shape[0] // experts
    down = read_tensor(stack.a).to(torch.float64).reshape(experts, rank, -1)  # (E, r, columns)
    up = read_tensor(stack.b).to(torch.float64).reshape(-1, rank, experts).permute(2, 0, 1) * module.scale
    if isinstance(module, ExpertModule) and module.turned != transposed:
        down, up = up.mT, down.mT  # (up down)^T = down^T up^T
    a = down.to(torch.float32).contiguous()  # (E, r, in)
    b = up.to(torch.float32).contiguous()  # (E, out, r)
    return ExpertFactors(
        stack.name,
        module.target if isinstance(module, ExpertModule) else module.parameter,
        stack.depth,
        rank,
        a.flatten(0, 1),
        b.permute(1, 2, 0).flatten(1).contiguous(),
        _figures([low_rank_errors(u, d, v, w) for u, d, v, w in zip(up, down, b, a, strict=True)], a, b),
    )


def _figures(errors: Sequence[tuple[float, float, float | None]], a: Tensor, b: Tensor) -> LayerFigures:
    worst = max(error[0] for error in errors)
    return LayerFigures(
        shape=(b.shape[1], a.shape[2]),
        rank=a.shape[1],
        route="exact",
        relative_error=worst,
        spectral_error=max(error[1] for error in errors),
        energy=1 - worst**2,
    )
