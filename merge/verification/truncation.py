"""Check that inexact low-rank factors are the best approximation of their rank, computed from the adapter only.

Calibrated factors, which were truncated for the outputs of a text, are the best in another norm, which depends on the
text. Without the text two conditions are checked: they are a projection of dW onto as many directions of the output
(truncated_svd.py), and these directions have at least CALIBRATED_SHARE of the energy of the best ones.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundModule
from adapter_merge.combine.combined_weight import CombinedModule
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.tensor_io import read_tensor

from .compare_weights import WEIGHT_TOLERANCE
from .weight_formulas import Adapted, TensorFormula
from .whole_formulas import formula_of

SCALE_TOLERANCE = 1e-5  # relative error of the rows' scale
OPTIMUM_TOLERANCE = 1e-4  # largest distance of truncated factors from the optimum, relative to dW
PROJECTION_TOLERANCE = 1e-3  # largest share of their error in their own rows and columns
DENSE_SIDE = 2048  # above it the singular values come from a randomised decomposition
CALIBRATED_SHARE = 0.5  # of the energy of dW that the best factors of the rank hold
SPARE = 8  # additional directions of the randomised decomposition, for its accuracy


def find_truncation_fault(item: BoundModule, factors: BoundModule, *, calibrated: bool = False) -> str | None:
    """Return why inexact factors F are not the best of their rank R; None where they are.

    F is a best approximation of dW (Eckart and Young, 1936) when its error is the least that rank R can have, and the
    remainder dW - F has no part in F's rows and columns: F^T (dW - F) = 0 and (dW - F) F^T = 0. With a magnitude this
    applies to the adapter's low-rank part, and the scale must be exact. calibrated: F was truncated for the outputs of
    a text, and is a projection onto output directions only.
    """
    if item.rows is not None or factors.rows is not None:
        return "an expert or a part of a tensor is not truncated"
    expected, exact_scale = direction_and_scale(item)
    delta, scale = direction_and_scale(factors)
    if not (bool(expected.isfinite().all()) and bool(delta.isfinite().all())):
        return "not finite"
    if scale is None and exact_scale is not None:  # a plain LoRA of a scaled weight
        base = read_tensor(item.weight).to(torch.float64).reshape(delta.shape)
        expected = (base + expected) * exact_scale - base
    elif scale is not None and isinstance(item, CombinedModule):  # no scale of one adapter: divide W' by this scale
        base = read_tensor(item.weight).to(torch.float64).reshape(delta.shape)
        expected = base + expected - base * scale
        delta = delta * scale
    elif scale is not None:
        if exact_scale is None or scale.shape != exact_scale.shape:
            return "it has a scale that the adapter does not have"
        scales = [value for value in (exact_scale, direction_and_scale(item, rounded=True)[1]) if value is not None]
        difference = min(
            float(torch.linalg.vector_norm(scale - value) / torch.linalg.vector_norm(value)) for value in scales
        )
        if not difference <= SCALE_TOLERANCE:
            return f"the scale differs by {difference:.3g}"
        expected, delta = (
            expected * scale,
            delta * scale,
        )  # the scaled change is what a server computes with, so its optimum counts
    size, remainder = torch.linalg.vector_norm(expected), expected - delta
    if not float(size):
        return "the adapter does not change it"
    error, best = float(torch.linalg.vector_norm(remainder) / size), _best_error(expected, factors.module.rank)
    by_rows, by_columns = (
        float(torch.linalg.vector_norm(product) / size**2) for product in (delta.T @ remainder, remainder @ delta.T)
    )
    if calibrated and not item.module.embedding and best > WEIGHT_TOLERANCE:
        overlap = by_columns if item.transposed else by_rows
        directions = _count_directions(delta, factors.module.rank)
        if directions < factors.module.rank:
            return f"only {directions} directions of rank {factors.module.rank}"
        if not 1 - error**2 >= CALIBRATED_SHARE * (1 - best**2):
            return f"relative error {error:.3g}, possible {best:.3g}: too large for a calibration"
    else:
        overlap = max(by_rows, by_columns)
        # Factors whose rank suffices for dW must be exact.
        if not error <= best + (OPTIMUM_TOLERANCE if best > WEIGHT_TOLERANCE else WEIGHT_TOLERANCE):
            return f"relative error {error:.3g}, possible {best:.3g}"
    return f"not a projection of dW, by {overlap:.3g}" if not overlap <= PROJECTION_TOLERANCE else None


def direction_and_scale(item: BoundModule, *, rounded: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the change of W0 before any scale, and the scale: (rows, 1) or (1, columns) of the stored tensor.

    rounded: include the rounding of a residual to half precision, which low-rank factors cannot express.
    """
    sources = Sources()
    try:
        formula = formula_of([item], sources)
        base = read_tensor(item.weight).to(torch.float64).reshape(item.weight.rows, -1)
        steps = formula.steps if isinstance(formula, TensorFormula) else ()
        change = steps[0].change if len(steps) == 1 else None
        if not isinstance(change, Adapted):
            return formula.after(base, 0)[0] - base, None
        if change.subtracted is not None and not rounded:
            subtracted = replace(change.subtracted, kept=torch.float32, product=None)
            change = replace(change, subtracted=subtracted)
        direction = change.direction(base, 0, sources)[0]
        if change.magnitude is None and not change.own_magnitude:
            return direction - base, None
        axis = 0 if change.by_column else 1
        magnitude = change.magnitude
        if magnitude is None:
            magnitude = torch.linalg.vector_norm(change.frozen(base, 0, sources)[0], dim=axis)
        norm = torch.linalg.vector_norm(direction, dim=axis, keepdim=True)
        return direction - base, magnitude.reshape(norm.shape) / norm
    finally:
        sources.close()


def _count_directions(delta: Tensor, rank: int) -> int:
    """Return how many of the first `rank` singular values of `delta` are above the rounding of float32 factors."""
    values = _leading_values(delta, rank)
    return int((values > WEIGHT_TOLERANCE * values[0]).sum())


def _best_error(delta: Tensor, rank: int) -> float:
    """Return the smallest relative error that factors of this rank can have."""
    total = float(delta.square().sum())
    if not total or rank >= min(delta.shape):
        return 0.0
    return math.sqrt(max(0.0, 1 - float(_leading_values(delta, rank).square().sum()) / total))


def _leading_values(delta: Tensor, rank: int) -> Tensor:
    """Return the `rank` largest singular values."""
    if min(delta.shape) <= DENSE_SIDE:
        every: Tensor = torch.linalg.svdvals(delta)
        return every[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values: Tensor = torch.svd_lowrank(delta, q=min(rank + SPARE, *delta.shape), niter=4)[1][:rank]
    return values
