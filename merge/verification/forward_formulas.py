"""Forward formulas of methods that PEFT does not have, from their papers and code, without the canonical form.

DCFT      y = plain(x) + (x Delta) alpha / (ranknum + 1e-5),  Delta = conv_transpose2d(A^T B^T, C)      (in, out)
reshape   y = plain(x) + x Delta^T,  Delta = (conv_transpose2d(B A, C) + bias).view(out, in)
LoRA ...  y = m / rownorm(W_f + s B A) * (x W_f^T + s x A^T B^T) + bias, W_f = round(W0 - s B0 A0), or the saved W_f
LyCORIS   y = x W'^T + bias, W' = W0 + s kron(W1, W2) or W0 + s (W1a W1b) * (W2a W2b), with its magnitudes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from adapter_merge.errors import UnsupportedError
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.methods.dcft import RANKNUM_EPSILON, DcftModule
from adapter_merge.methods.dcft_reshape import DcftReshapeModule
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import decompose
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

FLOAT32_NOISE = 2.0**-20  # relative to a residual's terms: the difference of two float32 decompositions of one weight
Forward = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]  # (layer, its own forward, x) -> y


def forward_of(module: AdaptedModule, layer: nn.Module, dtype: torch.dtype) -> Forward:
    """Return the adapted layer's forward in `dtype`; `layer` must hold the weight with the base's values."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise UnsupportedError(f"{module.name}: no reference forward for a convolution", hint="pass --weights-only")
    if isinstance(module, DcftModule):
        return _add_delta(_dcft_delta(module, dtype))
    if isinstance(module, DcftReshapeModule):
        return _add_delta(_reshaped_delta(module, dtype))
    if isinstance(module, LoraModule) and not module.embedding and module.e is None:
        return _lora_forward(module, layer, dtype)
    if isinstance(module, LokrModule | LohaModule):
        return _lycoris_forward(module, layer, dtype)
    raise UnsupportedError(f"{module.name}: no reference forward for {type(module).__name__}")


def _add_delta(delta: Tensor) -> Forward:  # delta (in, out)
    """Return the forward that adds x delta to the layer's own output."""

    def run(layer: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return plain(x) + x @ delta

    return run


def _dcft_delta(module: DcftModule, dtype: torch.dtype) -> Tensor:  # (in, out)
    image = read_tensor(module.a).to(dtype).mT @ read_tensor(module.b).to(dtype).mT  # (in/k0, out/k1), of each channel
    bias = None if module.bias is None else read_tensor(module.bias).to(dtype)
    image = image.reshape(1, module.c.shape[0], *image.shape[-2:])
    spread = nn.functional.conv_transpose2d(image, read_tensor(module.c).to(dtype), bias, stride=module.stride)
    return spread[0, 0] * dcft_scale(module)


def dcft_scale(module: DcftModule) -> float:
    """Return alpha / (ranknum + 1e-5), with r for an alpha of 0 (class SVDLinear of the reference)."""
    number = module.ranknum if isinstance(module.ranknum, float) else float(read_tensor(module.ranknum).reshape(-1)[0])
    scaling = module.alpha if module.alpha > 0 else number  # SVDLinear: lora_alpha if lora_alpha > 0 else float(r)
    return scaling / (number + RANKNUM_EPSILON)


def _reshaped_delta(module: DcftReshapeModule, dtype: torch.dtype) -> Tensor:  # (in, out)
    image = read_tensor(module.b).to(dtype) @ read_tensor(module.a).to(dtype)
    kernel = read_tensor(module.c).to(dtype)
    bias = None if module.bias is None else read_tensor(module.bias).to(dtype)
    image = image.reshape(1, kernel.shape[0], *image.shape[-2:])
    spread = nn.functional.conv_transpose2d(image, kernel, bias, stride=kernel.shape[2:])
    return spread[0, 0].reshape(module.shape).T


def _weight_of(layer: nn.Module) -> Tensor:  # (out, in), in the base's dtype
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def _with_bias(layer: nn.Module, y: Tensor) -> Tensor:
    return y + layer.bias if isinstance(layer.bias, Tensor) else y


def _frozen_of(module: LoraModule, weight: Tensor) -> Tensor:
    """Return W_f (out, in) in the dtype that it was rounded to."""
    if module.frozen is not None:
        return read_tensor(module.frozen)
    if module.initial is None:
        return weight
    return subtracted_from(module, lambda: weight, weight.dtype).rows(weight)[0]


@dataclass(frozen=True, eq=False)
class Subtracted:
    """The factors subtracted from W0 before training: W_f = round(W0 - s B0 A0), operations ordered as at training."""

    b: Tensor  # (out, r)
    a: Tensor  # (r, in)
    scale: float
    kept: torch.dtype  # of W_f
    product: torch.dtype | None = None  # of the factors and of s B0 A0 where these were rounded (MyTransformers)

    def transposed(self) -> Subtracted:
        """Return the factors subtracted from W0^T."""
        return replace(self, b=self.a.T.contiguous(), a=self.b.T.contiguous())

    def rows(self, weight: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return rows first .. first + n of W_f in `kept` for those of W0, and the uncertainty of float32 arithmetic.

        Two decompositions of one weight differ in their last bits, so that an element near the middle between two
        half-precision numbers may be rounded to either.
        """
        b = self.b[first : first + weight.shape[0]].to(torch.float32)
        product = b @ self.a.to(torch.float32)
        residual = self._compute_residual(weight, product)
        if self.kept in (torch.float32, torch.float64):
            return residual, torch.zeros((), dtype=torch.float64)
        noise = (weight.abs().to(torch.float32) / abs(self.scale) + product.abs()) * FLOAT32_NOISE
        low, high = (self._compute_residual(weight, product + sign * noise).to(torch.float64) for sign in (1, -1))
        return residual, (high - low).abs()

    def _compute_residual(self, weight: Tensor, product: Tensor) -> Tensor:
        """Return W_f in `kept` for rows of W0 and of B0 A0."""
        if self.product is None:
            return (weight.to(torch.float32) - self.scale * product).to(self.kept)
        # MyTransformers: LinearWithLoRA._compute_lora_weight, in the dtype of the factors, then in the weight's.
        subtracted = (self.scale * product.to(self.product)).to(self.kept)
        return (weight.to(self.kept).to(torch.float32) - subtracted.to(torch.float32)).to(self.kept)


def subtracted_from(module: LoraModule, weight: Callable[[], Tensor], stored: torch.dtype) -> Subtracted:
    """Return the factors subtracted from W0 (out, in); `weight` returns W0 in the base's dtype `stored`."""
    initial = module.initial
    assert initial is not None
    kept = TORCH_DTYPES[initial.dtype] if initial.dtype else stored
    product = TORCH_DTYPES[initial.product] if initial.product else None
    if initial.a is not None and initial.b is not None:
        scale = module.scale if initial.scale is None else initial.scale
        return Subtracted(read_tensor(initial.b), read_tensor(initial.a), scale, kept, product)
    return Subtracted(*decompose(initial, weight(), module.rank, module.scale), module.scale, kept, product)


def _lora_forward(module: LoraModule, layer: nn.Module, dtype: torch.dtype) -> Forward:
    a, b = read_tensor(module.a).to(dtype), read_tensor(module.b).to(dtype)
    frozen = _frozen_of(module, _weight_of(layer)).to(dtype)
    rows: Tensor | None = None  # (out,)
    columns: Tensor | None = None  # (in,)
    if module.magnitude is not None or module.own_magnitude:
        dim = 1 - module.magnitude_dim
        frozen_norm = torch.linalg.vector_norm(frozen, dim=dim)
        magnitude = frozen_norm if module.magnitude is None else read_tensor(module.magnitude).to(dtype).reshape(-1)
        scale = magnitude / torch.linalg.vector_norm(frozen + module.scale * (b @ a), dim=dim)
        rows, columns = (scale, None) if module.magnitude_dim == 0 else (None, scale)

    def run(layer: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x if columns is None else x * columns
        y: Tensor = x @ frozen.T + module.scale * (x @ a.T) @ b.T
        return _with_bias(layer, y if rows is None else rows * y)

    return run


def _lycoris_forward(module: LokrModule | LohaModule, layer: nn.Module, dtype: torch.dtype) -> Forward:
    def product(*refs: object) -> Tensor:
        return reduce(torch.matmul, [read_tensor(ref).to(dtype) for ref in refs])  # type: ignore[arg-type]

    if isinstance(module, LokrModule):
        delta = torch.kron(product(*module.w1), product(*module.w2))
    else:
        delta = product(module.w1a, module.w1b) * product(module.w2a, module.w2b)
    after = _weight_of(layer).to(dtype) + module.scale * delta
    if module.magnitude is not None:
        dim = 1 - module.magnitude_dim
        norm = torch.linalg.vector_norm(after, dim=dim, keepdim=True)
        after = after * (read_tensor(module.magnitude).to(dtype).reshape(norm.shape) / norm)

    def run(layer: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _with_bias(layer, x @ after.T)

    return run
