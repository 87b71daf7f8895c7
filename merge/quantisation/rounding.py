"""Rounding to the codes of a scheme: to the nearest code, or stochastically to one of the two neighbouring codes.

The stored weight lies on the grid of its codes. Rounding the merged weight to the nearest code gives the stored weight
back wherever the change is below half a step, which undoes most of a merge. Stochastic rounding (Gupta et al. 2015,
"Deep Learning with Limited Numerical Precision", section 3) rounds up with the probability (value - lower code) / step:
its expected value is the merged weight. The errors that it adds are independent of each other, and harm a model less
than the loss of a low-rank change of the same norm.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.random_numbers import BITS, random_bits

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 15  # random numbers per step, so that they fit into the processor's cache
UNIFORM_BITS = 24


def uniform_numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return reproducible uniform numbers of [0, 1), float32 of `shape`, that depend on `name` and position only.

    Each has 24 bits; two are made from one random number.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    count = math.prod(shape)
    uniform = torch.empty(-(-count // 2), 2, dtype=torch.float32)
    for first in range(0, uniform.shape[0], BLOCK):
        block = uniform[first : first + BLOCK]
        bits = random_bits(key, first, block.shape[0])
        block[:, 0] = bits >> (BITS - UNIFORM_BITS)
        block[:, 1] = bits & ((1 << UNIFORM_BITS) - 1)
        block *= 2.0**-UNIFORM_BITS
    return uniform.view(-1)[:count].view(shape)


def round_to_integers(values: Tensor, uniform: Tensor | None) -> Tensor:
    """Round `values` to integers in place: to the nearest, or with `uniform` up where fraction + uniform >= 1."""
    return values.round_() if uniform is None else values.add_(uniform).floor_()


def round_to_table(values: Tensor, table: Tensor, uniform: Tensor) -> Tensor:
    """Round `values` stochastically to the entries of `table` (n,), sorted; return their indices, int64.

    A value between two entries gets the upper one where (value - lower) > `uniform` * (upper - lower). Values outside
    the table get the index of its first or last entry.
    """
    above = torch.bucketize(values.contiguous(), table).clamp_(1, table.numel() - 1)
    low = table[above - 1]
    return above - 1 + (values - low > uniform * (table[above] - low)).long()
