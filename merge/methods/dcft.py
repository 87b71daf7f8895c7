"""DCFT (arXiv 2503.01419): a transposed convolution of a rank-r_sub image, and its exact low-rank factors.

    P     = lora_A^T lora_B^T                           (n0, n1), rank r_sub
    Delta = conv_transpose2d(P, lora_C, stride)         (in, out)
    y     = x W0^T + bias + (x Delta) alpha / (ranknum + 1e-5)          so dW = Delta^T alpha / (ranknum + 1e-5)

A transposed convolution is separable over the singular vectors of its kernel C = sum_j s_j u_j v_j^T and over the
rank-1 terms of P, so Delta = sum_rj deconv1d(A_r, s_j u_j) (x) deconv1d(B_r, v_j): rank <= r_sub rank(C), exactly,
for any stride, and without the dense Delta (Kronecker product where stride == kernel). Several channels are a sum of
such terms, Delta = sum_c kron(P_c, C_c) where stride == kernel; the deconvolution's own bias is a constant matrix, of
rank one.
Source: class SVDLinear in loralib/adalora.py of github Godz-z/DCFT. This file reproduces its forward(); its eval()
adds Delta untransposed and is not reproduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.errors import AdapterError
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .canonical_form import CanonicalForm

if TYPE_CHECKING:
    from torch import Tensor

RANKNUM_EPSILON = 1e-5


@dataclass(frozen=True)
class DcftModule(ModuleDefaults):
    """One weight adapted by DCFT, described by file headers only."""

    name: str
    a: TensorRef  # (r_sub, n0), or (channels, r_sub, n0)
    b: TensorRef  # (n1, r_sub), or (channels, n1, r_sub)
    c: TensorRef  # (channels, 1, k0, k1)
    ranknum: TensorRef | float  # one number; a float where the user stated it
    alpha: float  # 0 or less: SVDLinear then uses r, the value that it sets ranknum to
    stride: tuple[int, int]
    bias: TensorRef | None = None  # (1,): the bias of the deconvolution, added to every element of Delta

    @property
    def kernel(self) -> tuple[int, int]:
        return self.c.shape[2], self.c.shape[3]

    @property
    def r(self) -> int:
        """r_sub, the rank of the image P of one channel."""
        return self.a.shape[-2]

    @property
    def rank(self) -> int:
        """The upper bound channels * r_sub * min(k0, k1), plus 1 with a bias."""
        return self.c.shape[0] * self.r * min(self.kernel) + (self.bias is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        (k0, k1), (s0, s1) = self.kernel, self.stride
        return (self.b.shape[-2] - 1) * s1 + k1, (self.a.shape[-1] - 1) * s0 + k0

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.a, self.b, self.c, *self.untrained, *((self.bias,) if self.bias is not None else ()))

    @property
    def untrained(self) -> tuple[TensorRef, ...]:
        return () if isinstance(self.ranknum, float) else (self.ranknum,)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`. Does not read the base. Raises AdapterError for an unusable ranknum."""
        number = self.ranknum if isinstance(self.ranknum, float) else float(read(self.ranknum).reshape(-1)[0])
        if not (math.isfinite(number) and number > 0):
            raise AdapterError(
                f"{self.name}: ranknum is not a usable number",
                expected="a rank > 0, as the training stored it",
                got=str(number),
                hint="pass --ranknum NUMBER",
            )
        scale = (self.alpha if self.alpha > 0 else number) / (number + RANKNUM_EPSILON)
        channels = self.c.shape[0]
        images = read(self.a).reshape(channels, self.r, -1), read(self.b).reshape(channels, -1, self.r)
        up, down = channel_factors(*images, read(self.c)[:, 0], self.stride, scale)
        if self.bias is not None:
            constant = scale * float(read(self.bias))
            up = torch.cat((up, torch.full_like(up[:, :1], constant)), dim=1)
            down = torch.cat((down, torch.ones_like(down[:1])))
        return CanonicalForm(up.to(dtype), down.to(dtype))


def infer_stride(size: int, steps: int, kernel: int) -> int | None:
    """Return the stride with which `steps` inputs and a kernel of that size give exactly `size` outputs, or None."""
    if steps == 1:
        return kernel if size == kernel else None
    stride, remainder = divmod(size - kernel, steps - 1)
    return stride if remainder == 0 and stride >= 1 else None


def infer_steps(size: int, kernel: int, stride: int) -> int | None:
    """Return the number of inputs from which such a kernel at this stride gives exactly `size` outputs, or None.

    Also None for a stride above the kernel's size, which would leave outputs without an input.
    """
    steps, remainder = divmod(size - kernel, stride)
    return steps + 1 if remainder == 0 and steps >= 0 and stride <= kernel else None


def deconvolve(
    signals: Tensor,  # (r, n)
    kernels: Tensor,  # (j, k)
    stride: int,
) -> Tensor:  # (r * j, (n - 1) * stride + k)
    """Return conv_transpose1d of every signal with every kernel."""
    spread = torch.nn.functional.conv_transpose1d(signals[:, None, :], kernels[None], stride=stride)
    return spread.reshape(-1, spread.shape[-1])


def dcft_factors(
    a: Tensor,  # (r_sub, n0)
    b: Tensor,  # (n1, r_sub)
    c: Tensor,  # (k0, k1)
    stride: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return up (out, R) and down (R, in), float64, with up @ down == dW; R = r_sub * numerical rank of the kernel."""
    u, s, vh = torch.linalg.svd(c.to(torch.float64), full_matrices=False)
    # Singular values below float32's precision count as zero, whatever the stored dtype.
    kernel_rank = max(1, int((s > s[0] * max(c.shape) * torch.finfo(torch.float32).eps).sum()))
    root = s[:kernel_rank].sqrt()  # (j,)
    down = deconvolve(a.to(torch.float64), (u[:, :kernel_rank] * root).T, stride[0])  # (R, in)
    up = deconvolve(b.to(torch.float64).T, root[:, None] * vh[:kernel_rank], stride[1])  # (R, out)
    return scale * up.T.contiguous(), down


def channel_factors(
    a: Tensor,  # (channels, r_sub, n0)
    b: Tensor,  # (channels, n1, r_sub)
    c: Tensor,  # (channels, k0, k1)
    stride: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return up (out, R) and down (R, in), float64: the concatenated factors of all channels."""
    factors = [dcft_factors(*channel, stride, scale) for channel in zip(a, b, c, strict=True)]
    return torch.cat([up for up, _ in factors], dim=1), torch.cat([down for _, down in factors])
