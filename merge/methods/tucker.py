"""Convolutions adapted through a core (LyCORIS' use_tucker, PEFT's use_effective_conv2d): the core's rank factors.

    dW (out, in, k, k) = sum_ij wa[i, out] core[i, j, k, k] wb[j, in]

core (r, r, k, k), wa (r, out), wb (r, in).

As a matrix (out, in k k) it is wa^T times (r, in k k), so that its rank is at most r.
Source: make_weight_cp in peft/tuners/lokr/layer.py; a LoCon's lora_mid is the core between lora_down and lora_up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

if TYPE_CHECKING:
    from torch import Tensor


def tucker_down(
    core: Tensor,  # (r, r, k, ...)
    wb: Tensor,  # (r, in)
) -> Tensor:  # (r, in k ...)
    """Return the factor that follows wa^T."""
    flat = core.reshape(*core.shape[:2], -1)  # (r, r, K)
    return torch.einsum("ijk,jn->ink", flat, wb).reshape(core.shape[0], -1)


def core_fits(core: TensorRef, wa: TensorRef, wb: TensorRef) -> bool:
    """Return True for a core (r, r, k, ...) between wa (r, out) and wb (r, in), none of them empty."""
    shapes = (core.shape, wa.shape, wb.shape)
    if len(core.shape) < 3 or any(0 in shape for shape in shapes):
        return False
    return len(wa.shape) == len(wb.shape) == 2 and core.shape[:2] == (wa.shape[0], wb.shape[0])


def kernel_size(core: TensorRef | None) -> int:
    """Return k k of the core, 1 without one."""
    return 1 if core is None else math.prod(core.shape[2:])
