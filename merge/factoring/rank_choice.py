"""Choice of ranks: the smallest rank that keeps an energy, and ranks of all weights within a budget of bytes.

Within a budget each further rank goes to the weight where it removes most squared error per byte. The gain of a
weight's next rank is its next squared singular value, the cost 4 (out + in) bytes. The gains of a weight decrease, so
the greedy choice by gain per byte is optimal except for the last items (fractional knapsack).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_merge.errors import InputError

BYTES = 4  # float32


def rank_for_energy(squares: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps `energy` (0 .. 1) of the squared singular values, in descending order.

    Compares the omitted energy, summed from the smallest: 1 - energy may be as small as the rounding of the total.
    """
    squares = squares.to(torch.float64)
    tails = torch.flip(torch.cumsum(torch.flip(squares, (0,)), 0), (0,))  # tails[k] = sum of squares[k:]
    if not float(tails[0]) > 0:
        return 1
    allowed = (1.0 - energy) * float(tails[0])
    return max(1, min(int((tails > allowed).sum()), squares.numel()))


def bytes_of(shape: tuple[int, int], rank: int) -> int:
    """Return the size in bytes of both factors of a weight (out, in)."""
    return BYTES * rank * (shape[0] + shape[1])


def allot_ranks(
    squares: Sequence[Tensor],  # per weight: (l,) float64, descending
    shapes: Sequence[tuple[int, int]],
    budget: int,  # bytes
) -> list[int]:
    """Return a rank of at least 1 for every weight. Raises InputError where rank 1 for all exceeds the budget."""
    least = sum(bytes_of(shape, 1) for shape in shapes)
    if least > budget:
        raise InputError(
            "--budget is too small",
            expected=f"at least {least / 1e6:.2f} MB (rank 1 for each of {len(shapes)} weights)",
            got=f"{budget / 1e6:.2f} MB",
        )
    ranks = [1] * len(shapes)
    left = budget - least

    def make_offer(index: int) -> tuple[float, int]:
        return -float(squares[index][ranks[index]]) / bytes_of(shapes[index], 1), index

    heap = [make_offer(index) for index in range(len(shapes)) if squares[index].numel() > 1]
    heapq.heapify(heap)
    while heap:
        gain, index = heapq.heappop(heap)
        price = bytes_of(shapes[index], 1)
        if gain == 0 or price > left:
            continue  # a smaller weight may still fit
        left -= price
        ranks[index] += 1
        if ranks[index] < squares[index].numel():
            heapq.heappush(heap, make_offer(index))
    return ranks
