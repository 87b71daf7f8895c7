"""Rounding to a scheme's codes: to the nearest, or at random between the two neighbours so that the mean is right.

Rounding a merged weight to the nearest code of its own grid undoes most of the merge: the stored weight lies on the
grid, and a change below half a step vanishes. Rounding up with the probability of the distance from the lower code
(Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3) keeps every change in the mean; the
noise that it adds has no direction, where what an adapter has learned has few.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.random_numbers import BITS, random_bits

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 15  # random numbers that are made in one step, in the processor's cache
DRAW_BITS = 24


def draw_for(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return numbers of [0, 1), float32 of `shape`, that depend on `name` and the place alone.

    Each of 24 bits, two from one random number.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    count = math.prod(shape)
    draw = torch.empty(-(-count // 2), 2, dtype=torch.float32)
    for first in range(0, draw.shape[0], BLOCK):
        block = draw[first : first + BLOCK]
        bits = random_bits(key, first, block.shape[0])
        block[:, 0] = bits >> (BITS - DRAW_BITS)
        block[:, 1] = bits & ((1 << DRAW_BITS) - 1)
        block *= 2.0**-DRAW_BITS
    return draw.view(-1)[:count].view(shape)


def to_integers(values: Tensor, draw: Tensor | None) -> Tensor:
    """Return `values` rounded to integers, in place: to the nearest, or up where the fraction exceeds 1 - `draw`."""
    return values.round_() if draw is None else values.add_(draw).floor_()


def to_table(values: Tensor, table: Tensor, draw: Tensor) -> Tensor:
    """Return the index in `table` (n,), sorted, of the neighbour above where `values` are past `draw` of the way to it.

    Beyond the ends the index is that of the end.
    """
    above = torch.bucketize(values.contiguous(), table).clamp_(1, table.numel() - 1)
    low = table[above - 1]
    return above - 1 + (values - low > draw * (table[above] - low)).long()
