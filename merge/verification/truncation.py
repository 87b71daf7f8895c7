"""Whether inexact low-rank factors are the best ones of their rank, computed from the adapter alone.

Factors that were cut for the outputs of a text (calibrated) are the best in another norm, which needs the text. What
must hold of them without it: they are a projection of dW onto as many directions of the output (truncated_svd.py), and
these directions hold at least CALIBRATED_SHARE of what the best ones hold.
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
OPTIMUM_TOLERANCE = 1e-4  # truncated factors: how far they may be from the optimum, relative to dW
PROJECTION_TOLERANCE = 1e-3  # and how much of their error may lie in their own rows and columns
DENSE_SIDE = 2048  # above it the singular values come from a randomised decomposition
CALIBRATED_SHARE = 0.5  # of the energy of dW that the best factors of the rank hold
SPARE = 8  # more directions than are kept: its accuracy


def not_optimal(item: BoundModule, factors: BoundModule, *, calibrated: bool = False) -> str | None:
    """Why inexact factors F are not the best ones of their rank R; None where they are.

    F is a best approximation of dW (Eckart and Young, 1936) when its error is the least that rank R can have, and the
    rest dW - F has nothing in F's rows and columns: F^T (dW - F) = 0 and (dW - F) F^T = 0. Under a magnitude this holds
    of the adapter's own low-rank part, and the scale must be the exact one. calibrated: F was cut for the outputs of a
    text, and is a projection onto output directions only.
    """
    if item.rows is not None or factors.rows is not None:
        return "an expert or a part of a tensor is not truncated"
    wanted, exact_scale = direction_and_scale(item)
    delta, scale = direction_and_scale(factors)
    if not (bool(wanted.isfinite().all()) and bool(delta.isfinite().all())):
        return "not finite"
    if scale is None and exact_scale is not None:  # a plain LoRA of a scaled weight
        base = read_tensor(item.weight).to(torch.float64).reshape(delta.shape)
        wanted = (base + wanted) * exact_scale - base
    elif scale is not None and isinstance(
        item, CombinedModule
    ):  # whose scale is not one adapter's: take W' by this one
        base = read_tensor(item.weight).to(torch.float64).reshape(delta.shape)
        wanted = base + wanted - base * scale
        delta = delta * scale
    elif scale is not None:
        if exact_scale is None or scale.shape != exact_scale.shape:
            return "a scale that the adapter does not have"
        near = [one for one in (exact_scale, direction_and_scale(item, rounded=True)[1]) if one is not None]
        off = min(float(torch.linalg.vector_norm(scale - one) / torch.linalg.vector_norm(one)) for one in near)
        if not off <= SCALE_TOLERANCE:
            return f"the scale is off by {off:.3g}"
        wanted, delta = wanted * scale, delta * scale  # the best of what is served
    size, rest = torch.linalg.vector_norm(wanted), wanted - delta
    if not float(size):
        return "the adapter does not change it"
    error, best = float(torch.linalg.vector_norm(rest) / size), _best_error(wanted, factors.module.rank)
    by_rows, by_columns = (float(torch.linalg.vector_norm(one) / size**2) for one in (delta.T @ rest, rest @ delta.T))
    if calibrated and not getattr(item.module, "embedding", False):
        overlap = by_columns if item.transposed else by_rows
        if not 1 - error**2 >= CALIBRATED_SHARE * (1 - best**2):
            return f"relative error {error:.3g}, possible {best:.3g}: too far off for a calibration"
    else:
        overlap = max(by_rows, by_columns)
        # Factors whose rank holds all of dW are exact ones, or wrong.
        if not error <= best + (OPTIMUM_TOLERANCE if best > WEIGHT_TOLERANCE else WEIGHT_TOLERANCE):
            return f"relative error {error:.3g}, possible {best:.3g}"
    return f"not a projection of dW, by {overlap:.3g}" if not overlap <= PROJECTION_TOLERANCE else None


def direction_and_scale(item: BoundModule, *, rounded: bool = False) -> tuple[Tensor, Tensor | None]:
    """What is added to W0 before any scale, and the scale: (rows, 1) or (1, columns) of the stored tensor.

    Unless `rounded`, of a residual without its rounding to half precision, which no low-rank factors can express.
    """
    sources = Sources()
    try:
        formula = formula_of([item], sources)
        base = read_tensor(item.weight).to(torch.float64).reshape(item.weight.rows, -1)
        steps = formula.steps if isinstance(formula, TensorFormula) else ()
        what = steps[0].what if len(steps) == 1 else None
        if not isinstance(what, Adapted):
            return formula.after(base, 0)[0] - base, None
        if what.subtracted is not None and not rounded:
            cut = replace(what.subtracted, kept=torch.float32, product=None)
            what = replace(what, subtracted=cut)
        direction = what.direction(base, 0, sources)[0]
        if what.magnitude is None and not what.own_magnitude:
            return direction - base, None
        axis = 0 if what.by_column else 1
        magnitude = what.magnitude
        if magnitude is None:
            magnitude = torch.linalg.vector_norm(what.frozen(base, 0, sources)[0], dim=axis)
        norm = torch.linalg.vector_norm(direction, dim=axis, keepdim=True)
        return direction - base, magnitude.reshape(norm.shape) / norm
    finally:
        sources.close()


def _best_error(delta: Tensor, rank: int) -> float:
    """The least relative error that factors of this rank can have."""
    total = float(delta.square().sum())
    if not total or rank >= min(delta.shape):
        return 0.0
    if min(delta.shape) <= DENSE_SIDE:
        values = torch.linalg.svdvals(delta)[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = torch.svd_lowrank(delta, q=min(rank + SPARE, *delta.shape), niter=4)[1][:rank]
    return math.sqrt(max(0.0, 1 - float(values.square().sum()) / total))
