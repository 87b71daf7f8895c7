"""DCFT as a tuner of PEFT: which modules it replaces by its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from adapter_merge.errors import InputError, Problem, raise_all
from adapter_merge.methods.dcft import infer_steps

from .config import DCFTConfig
from .layer import DCFTLinear

if TYPE_CHECKING:
    from collections.abc import Callable


class DCFTModel(BaseTuner):  # type: ignore[misc, unused-ignore]
    """Replace the targeted linear layers of a model by DCFTLinear.

    Raises InputError with every targeted module whose sizes do not fit the kernel, or that is no linear layer.
    """

    prefix = "lora_"
    tuner_layer_cls = DCFTLinear
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (PEFT's own type)
    active_adapters: list[str]  # of BaseTuner
    _replace_module: Callable[[nn.Module, str, nn.Module, nn.Module], None]
    _problems: tuple[Problem, ...] = ()

    def _create_and_replace(
        self,
        dcft_config: DCFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, DCFTLinear) else target
        size = linear_size(base)
        problem = check_size(current_key, base, size, dcft_config)
        if problem is not None:
            self._problems = (*self._problems, problem)
        elif isinstance(target, DCFTLinear):
            target.update_layer(adapter_name, dcft_config)
        else:
            assert size is not None, "check_size has a problem for it"
            layer = DCFTLinear(target, size, adapter_name, dcft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: DCFTConfig, adapter_name: str) -> None:
        problems, self._problems = self._problems, ()
        raise_all(list(problems), InputError)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear layer or a Conv1D; None for any other module, quantised layers included."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return weight.shape[0], weight.shape[1]
    return None


def check_size(name: str, base: nn.Module, size: tuple[int, int] | None, config: DCFTConfig) -> Problem | None:
    """Return a problem where DCFT with this kernel and stride cannot adapt a module."""
    assert isinstance(config.kernel_size, list)
    assert isinstance(config.stride, list)
    if size is None:
        return Problem(f"{name}: DCFT cannot adapt it", "a linear layer with floating-point weights", repr(base)[:100])
    steps = [infer_steps(*sides) for sides in zip(size, config.kernel_size, config.stride, strict=True)]
    if None in steps:
        return Problem(
            f"{name}: its sizes do not fit the kernel",
            f"(in, out) reached by kernels {config.kernel_size} at stride {config.stride}",
            str(size),
            "choose a kernel_size that divides both, or leave the module out with exclude_modules",
        )
    return None
