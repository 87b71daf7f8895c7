"""The formula of every stored tensor, for one adapter or a combination, and whole weights computed by it.

A combination is computed in float64 from its definition (combination_definition.py), which shares no code with the
merge. Sums, and adapters applied one after the other, are computed by blocks of rows; methods that sort all elements
need the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.combined_weight import CombinedModule
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.tensor_io import read_tensor

from .combination_definition import defined_delta
from .weight_formulas import Formula, formula_in_turn, tensor_formula

FLOAT32_ERROR = 8 * 2**-24  # a few roundings of a float32 sum, relative to its terms
UNSURE_SHARE = 1e-2  # largest share of elements near a threshold, which float32 may keep or drop


@dataclass(frozen=True, eq=False)
class _ComputedWeight:
    """A weight that was computed as a whole."""

    weight: Tensor  # (rows, columns) float64
    slack: Tensor | None

    def after(self, base: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        rows = slice(first, first + base.shape[0])
        return self.weight[rows], None if self.slack is None else self.slack[rows]


@dataclass(frozen=True, eq=False)
class _WeightedSum:
    """W0 + sum_i w_i (W_i - W0), where W_i is the weight with adapter i alone."""

    terms: tuple[tuple[float, Formula], ...]

    def after(self, base: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        result = base
        for weight, formula in self.terms:
            result = result + weight * (formula.after(base, first)[0] - base)
        return result, None


def modules_by_tensor(bound: BoundAdapter) -> dict[str, list[BoundModule]]:
    """Return the modules by the tensor that they change; a tensor of stacked experts has many."""
    modules: dict[str, list[BoundModule]] = {}
    for item in bound.modules:
        modules.setdefault(item.name, []).append(item)
    return modules


def formula_of(items: Sequence[BoundModule], sources: Sources) -> Formula:
    """Return the formula of one tensor: that of its adapter's method, or the definition of its combination."""
    item = items[0]
    return _combination_formula(item, sources) if isinstance(item, CombinedModule) else tensor_formula(items, sources)


def _combination_formula(item: CombinedModule, sources: Sources) -> Formula:
    """Return the formula of a combination; methods that sort all elements compute the whole weight."""
    combination = item.combination
    shares = [(share.replacement, share.modules) for share in combination.shares]
    if combination.in_turn:
        return formula_in_turn(shares, sources)
    alone = [formula_in_turn([share], sources) for share in shares]
    if combination.settings.method == "linear":
        return _WeightedSum(
            tuple((share.weight, formula) for share, formula in zip(combination.shares, alone, strict=True))
        )
    base = read_tensor(item.weight).to(torch.float64)
    rows = base.reshape(1, -1) if base.dim() < 2 else base.reshape(-1, base.shape[-1])
    deltas = [formula.after(rows, 0)[0] - rows for formula in alone]
    noise = sum((delta.abs() for delta in deltas), rows.abs() + typical_size(rows)) * FLOAT32_ERROR
    parts = combination.parts([share.edit(torch.float64) for share in combination.shares])
    combined, unsure = defined_delta(deltas, parts, combination.settings, noise)
    is_usable = float(unsure.float().mean()) <= UNSURE_SHARE
    return _ComputedWeight(rows + combined, torch.where(unsure, math.inf, 0.0).to(torch.float64) if is_usable else None)


def whole_weight(items: Sequence[BoundModule]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return W0, W' and the slack of W' (see Formula) of one stored tensor, as a whole in float64."""
    sources = Sources()
    try:
        ref = items[0].weight
        base = read_tensor(ref).to(torch.float64)
        after, slack = formula_of(items, sources).after(base.reshape(ref.rows, -1), 0)
        return base, after.reshape(base.shape), None if slack is None else slack.reshape(base.shape)
    finally:
        sources.close()


def typical_size(weight: Tensor) -> float:
    """Return the root mean square of the elements."""
    return float(torch.linalg.vector_norm(weight)) / math.sqrt(max(1, weight.numel()))
