"""DCFT beside a frozen linear layer, trained through its low-rank factors: Delta is not formed in forward.

    Delta = conv_transpose2d(A^T B^T, C, stride)            A (r, n0), B (n1, r), C (1, 1, k0, k1); Delta (in, out)
    y     = x W0^T + bias + x Delta alpha / (ranknum + 1e-5)

Source: class SVDLinear in loralib/adalora.py of github Godz-z/DCFT, its forward().
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from adapter_merge.methods.dcft import RANKNUM_EPSILON, infer_steps

from .config import DCFTConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INIT_STD = 0.1


class DCFTLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc, unused-ignore]
    """A linear layer, or GPT-2's Conv1D, with DCFT adapters by name; the names of its tensors are those on disk."""

    active_adapters: list[str]  # of BaseTunerLayer
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    adapter_layer_names = ("lora_A", "lora_B", "lora_C")
    other_param_names = ("ranknum",)

    def __init__(
        self,
        base_layer: nn.Module,
        size: tuple[int, int],  # (in, out)
        adapter_name: str,
        config: DCFTConfig,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = size
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_C = nn.ParameterDict()
        self.ranknum = BufferDict(persistent=True)
        self.lora_dropout = nn.ModuleDict()
        self.alpha: dict[str, float] = {}
        self.strides: dict[str, tuple[int, int]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: DCFTConfig) -> None:
        """Add the adapter `adapter_name`. Its sizes were checked by the model."""
        assert isinstance(config.kernel_size, list)
        assert isinstance(config.stride, list)
        (k0, k1), (s0, s1) = config.kernel_size, config.stride
        n0, n1 = infer_steps(self.in_features, k0, s0), infer_steps(self.out_features, k1, s1)
        assert n0 is not None
        assert n1 is not None
        self.alpha[adapter_name] = config.lora_alpha
        self.strides[adapter_name] = (s0, s1)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.lora_A[adapter_name] = nn.Parameter(torch.randn(config.r, n0) * INIT_STD)
        b = torch.zeros(n1, config.r) if config.init_weights else torch.randn(n1, config.r) * INIT_STD
        self.lora_B[adapter_name] = nn.Parameter(b)
        self.lora_C[adapter_name] = nn.Parameter(torch.randn(1, 1, k0, k1) * INIT_STD)
        self.ranknum[adapter_name] = torch.full((1,), float(config.r))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def scale(self, adapter_name: str) -> Tensor:  # (1,)
        """alpha / (ranknum + 1e-5); an alpha of 0 or less counts as ranknum, as in the reference."""
        number = self.ranknum[adapter_name]
        alpha = self.alpha[adapter_name]
        scaled: Tensor = (number if alpha <= 0 else alpha) / (number + RANKNUM_EPSILON)
        return scaled

    def get_delta_weight(self, adapter_name: str) -> Tensor:  # (out, in), float32 or wider
        """Return dW = Delta^T alpha / (ranknum + 1e-5), by the transposed convolution itself."""
        a, b, c = (self.lora_A[adapter_name], self.lora_B[adapter_name], self.lora_C[adapter_name])
        wide = torch.promote_types(a.dtype, torch.float32)
        image = a.to(wide).T @ b.to(wide).T  # (n0, n1)
        delta = functional.conv_transpose2d(image[None, None], c.to(wide), stride=self.strides[adapter_name])
        change: Tensor = delta[0, 0].T * self.scale(adapter_name).to(wide)
        return change

    def change(
        self,
        x: Tensor,  # (..., in)
        adapter_name: str,
    ) -> Tensor:  # (..., out)
        """Return x Delta alpha / (ranknum + 1e-5): patches of x by A, the kernel, then spread by B."""
        a, b, c = (self.lora_A[adapter_name], self.lora_B[adapter_name], self.lora_C[adapter_name])
        (s0, s1), (k0, k1) = self.strides[adapter_name], c.shape[2:]
        x = self.lora_dropout[adapter_name](self._cast_input_dtype(x, a.dtype))
        squeezed = a @ x.unfold(-1, k0, s0)  # (r, n0) (..., n0, k0) = (..., r, k0)
        spread = b @ (squeezed @ c[0, 0])  # (n1, r) (..., r, k1) = (..., n1, k1)
        if s1 == k1:
            change = spread.flatten(-2)  # (..., out)
        else:
            columns = spread.reshape(-1, *spread.shape[-2:]).transpose(1, 2)  # (N, k1, n1)
            change = functional.fold(columns, (1, self.out_features), (1, k1), stride=(1, s1))
            change = change.reshape(*x.shape[:-1], self.out_features)
        scaled: Tensor = change * self.scale(adapter_name)
        return scaled

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.lora_A:
                result = result + self.change(x, adapter_name)
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add dW of the active or named adapters to the base weight, rounded once. safe_merge: refuse NaN and inf."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.lora_A:
                weight = self._sum(self.get_delta_weight(adapter_name))
                if safe_merge and not torch.isfinite(weight).all():
                    raise ValueError(f"the merged weight holds NaN or inf: the adapter {adapter_name} is broken")
                self.get_base_layer().weight.data = weight
                self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Subtract the merged changes again; exact up to the rounding of the base weight's dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.get_base_layer().weight.data = self._sum(-self.get_delta_weight(self.merged_adapters.pop()))

    def _sum(self, change: Tensor) -> Tensor:
        """Return the base weight plus `change` (out, in), in the base's dtype and orientation."""
        weight = self.get_base_layer().weight.data
        change = change if isinstance(self.get_base_layer(), nn.Linear) else change.T  # Conv1D: (in, out)
        total: Tensor = (weight.to(change.dtype) + change).to(weight.dtype)
        return total
