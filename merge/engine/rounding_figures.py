"""What a merge did to one weight, measured on a sample of its blocks while they are in cache.

Measuring every block would cost more than the merge: eight passes over the weight beside the merge's five. A weight of
one block is measured whole; of larger ones the first rows of a few blocks, spread over the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED_BLOCKS = 4
SAMPLED_SHARE = 4  # one in so many rows of a sampled block
SUMS = 6
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class TensorFigures:
    """What one tensor's merge did. All but `sampled` are taken over the sampled rows; norms in float32.

    rounding has no sign: it is the noise that rounding to the output dtype added. lost is what that rounding
    swallowed: the share of sum |dW| that stands in elements whose stored value is still the base's.
    """

    relative_delta: float  # ||W' - W0|| / ||W0||
    rounding: float  # ||round(W') - W'|| / ||W' - W0||
    changed: float  # fraction of elements whose stored value changed
    lost: float  # sum |dW| over unchanged elements / sum |dW|
    sampled: float  # fraction of the tensor's elements that these figures were taken over


def sampled_rows(number: int, blocks: int, rows: int) -> int:
    """How many of the `rows` of a weight's block `number` (of `blocks`) are measured: the first ones, or none."""
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
    """Squares of W0, dW and the rounding error, the count of changed elements, sum |dW|, sum |dW| where unchanged."""
    work.copy_(before)
    sums[0] = torch.linalg.vector_norm(work) ** 2
    work.sub_(after)
    sums[1] = torch.linalg.vector_norm(work) ** 2
    work.abs_()
    sums[4] = work.sum()
    if stored.dtype == before.dtype:
        bits = BITS[stored.dtype]  # whole numbers compare three times as fast as bfloat16
        same = stored.view(bits) == before.view(bits)
        sums[3] = same.numel() - same.sum()
        sums[5] = work.mul_(same).sum()
    else:
        sums[3] = stored.numel()
        sums[5] = 0
    work.copy_(stored)
    work.sub_(after)
    sums[2] = torch.linalg.vector_norm(work) ** 2


class FigureTotals:
    """One tensor's block sums, added up in Python floats (float64)."""

    def __init__(self) -> None:
        self.sums = [0.0] * SUMS
        self.elements = 0

    def add(self, sums: Tensor, elements: int) -> None:
        """Add one block's sums (SUMS,) over `elements` elements."""
        for index, value in enumerate(sums.tolist()):
            self.sums[index] += value
        self.elements += elements

    def figures(self, count: int) -> TensorFigures:
        """The figures of a tensor of `count` elements."""
        base, delta, rounding, changed, absolute, unchanged = self.sums
        return TensorFigures(
            relative_delta=math.sqrt(delta / base) if base else 0.0,
            rounding=math.sqrt(rounding / delta) if delta else 0.0,
            changed=changed / self.elements if self.elements else 0.0,
            lost=unchanged / absolute if absolute else 0.0,
            sampled=self.elements / count if count else 0.0,
        )
