"""Figures of one merged weight (size of the change, rounding error), measured on a sample while it is in the cache.

Measuring every block would cost more than the merge itself: eight passes over the weight, where the merge takes five.
A weight of one block is measured whole; of a larger weight, the first rows of a few blocks spread over it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .weight_change import WeightChange

SAMPLED_BLOCKS = 4  # of one weight, about
SAMPLED_SHARE = 4  # a sampled block has one in this many of its rows measured
SUMS = 6  # numbers per block, in the order of `block_sums`
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def sampled_rows(number: int, blocks: int, rows: int) -> int:
    """Return how many of the `rows` of block `number` (of `blocks`) are measured; they are the block's first rows."""
    if blocks == 1:
        return rows
    return 0 if number % max(1, blocks // SAMPLED_BLOCKS) else -(-rows // SAMPLED_SHARE)


def block_sums(
    before: Tensor,  # (n, columns), as stored
    after: Tensor,  # (n, columns), float32, before rounding
    stored: Tensor,  # (n, columns), after rounding
    work: Tensor,  # (n, columns), float32, overwritten
    sums: Tensor,  # (SUMS,), float32, overwritten
) -> None:
    """Compute the sums of one block and write them into `sums`.

    In order: the sums of squares of W0, of dW and of the rounding error; the number of elements whose stored value
    changed; sum |dW|; and sum |dW| over the elements whose stored value did not change.
    """
    work.copy_(before)
    sums[0] = torch.linalg.vector_norm(work) ** 2
    work.sub_(after)
    sums[1] = torch.linalg.vector_norm(work) ** 2
    work.abs_()
    sums[4] = work.sum()
    if stored.dtype == before.dtype:
        bits = BITS[stored.dtype]  # integers compare three times as fast as bfloat16
        is_unchanged = stored.view(bits) == before.view(bits)
        sums[3] = is_unchanged.numel() - is_unchanged.sum()
        sums[5] = work.mul_(is_unchanged).sum()
    else:
        sums[3] = stored.numel()
        sums[5] = 0
    work.copy_(stored)
    work.sub_(after)
    sums[2] = torch.linalg.vector_norm(work) ** 2


class FigureTotals:
    """Total of the block sums of one tensor, in Python floats (float64)."""

    def __init__(self) -> None:
        self.sums = [0.0] * SUMS
        self.elements = 0

    def add(self, sums: Tensor, elements: int) -> None:
        """Add the sums (SUMS,) of one block of which `elements` elements were measured."""
        for index, value in enumerate(sums.tolist()):
            self.sums[index] += value
        self.elements += elements

    def figures(self, count: int) -> WeightChange:
        """Return the figures of a tensor of `count` elements."""
        base, delta, rounding, changed, absolute, unchanged = self.sums
        return WeightChange(
            relative_delta=math.sqrt(delta / base) if base else 0.0,
            rounding=math.sqrt(rounding / delta) if delta else 0.0,
            changed=changed / self.elements if self.elements else 0.0,
            lost=unchanged / absolute if absolute else 0.0,
            sampled=self.elements / count if count else 0.0,
        )
