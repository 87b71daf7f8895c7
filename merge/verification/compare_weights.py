"""Every adapted weight of an artefact against the methods' formulas in float64, and the rest against the base's bytes.

Streamed: blocks of rows of base and artefact, one worker per core; no whole weight is held but for a combination's.

    whole_formulas.py   the formula of each stored tensor
    carried_over.py     what is not adapted: tensors and config
    compare_factors.py  other adapters: converted folders, factors
    truncation.py       whether truncated factors are the best of their rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapter_merge.binding.bound import BoundAdapter, BoundModule
from adapter_merge.engine.weight_pool import weight_pool
from adapter_merge.storage.checkpoint import Checkpoint, read_weights
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .carried_over import HALVES, carried_over, config_problems
from .weight_formulas import Formula, read_rows, row_blocks
from .whole_formulas import FLOAT32_ERROR, formula_of, modules_by_tensor, typical_size

WEIGHT_TOLERANCE = 1e-5  # relative error of dW, float32

Progress = Callable[[int], None]  # called with bytes that were compared


@dataclass(frozen=True)
class WeightFigures:
    """One adapted weight of the artefact against the exact one."""

    relative_error: float  # ||W' - exact|| / ||dW||
    excess_ulp: float  # worst element beyond float32 arithmetic and one correct rounding, in ulp of the dtype
    dtype: str  # as the artefact stores it, or its quantisation scheme
    retention: float | None = None  # <Q(W') - W, dW> / |dW|^2 of a weight that was quantised again
    size: float = 0.0  # |dW| of such a weight


@dataclass(frozen=True)
class WeightProof:
    """What was compared, and what is wrong with it."""

    layers: dict[str, WeightFigures]
    problems: list[str] = field(default_factory=list)
    compared: int = 0  # tensors, those included that are not adapted but replaced

    @property
    def is_requantised(self) -> bool:
        """True where adapted weights are quantised, which no tolerance of logits can be stated for."""
        return any(one.retention is not None for one in self.layers.values())

    @property
    def half(self) -> str | None:
        """BF16 or F16 where an adapted weight is kept in half precision."""
        return next((name for name in HALVES if any(one.dtype == name for one in self.layers.values())), None)


def compare_blocks(
    ref: TensorRef,  # of W0
    exact: Formula,
    got: Callable[[int, int, Tensor], Tensor],  # (first, stop, W0's rows in float64) -> the artefact's, in its dtype
    dtype: str,
    sources: Sources,
    *,
    is_delta: bool = False,
) -> WeightFigures:
    kept = TORCH_DTYPES[dtype]
    size, error, excess = 0.0, 0.0, 0.0
    for first, stop in row_blocks(ref):
        base = read_rows(sources, ref, first, stop).to(torch.float64)
        after, slack = exact.after(base, first)
        change = after - base
        stored = got(first, stop, base)
        wanted = change if is_delta else after
        off = stored.to(torch.float64) - wanted
        if slack is not None:
            off = (off.abs() - slack).clamp_min(0)
        size += _square(change)
        error += _square(off)
        wrong = off != 0 if stored.dtype == torch.float64 else (wanted.to(kept) != stored)
        if bool(wrong.any()):
            places = wrong.nonzero(as_tuple=True)
            near = base[places], change[places], kept, base
            excess = max(excess, float(_excess(wanted[places], off[places].abs(), *near)))
    if math.isnan(error) or math.isnan(excess):
        return WeightFigures(math.inf, math.inf, dtype)
    return WeightFigures(math.sqrt(error / size) if size else math.sqrt(error), excess, dtype)


def _square(block: Tensor) -> float:
    """Return the sum of squares of a block of float64."""
    flat = block.reshape(-1)
    return float(flat.dot(flat))


def _excess(wanted: Tensor, off: Tensor, base: Tensor, change: Tensor, kept: torch.dtype, block: Tensor) -> Tensor:
    """The worst of `off` beyond float32 arithmetic and half an ulp, in ulp; NaN where something is NaN."""
    _, exponent = torch.frexp(wanted.abs().clamp_min(torch.finfo(kept).tiny))
    ulp = torch.ldexp(torch.full_like(wanted, torch.finfo(kept).eps), exponent - 1)
    # Where W0 and dW cancel, float32 arithmetic is off by parts of their size, not of the small result's.
    arithmetic = FLOAT32_ERROR * (base.abs() + change.abs() + typical_size(block))
    found = (off - arithmetic) / ulp - 0.5
    return found.max().clamp_min(0) if not bool(found.isnan().any()) else found.new_tensor(math.nan)


def compare_each(
    names: Sequence[str], compare: Callable[[str], WeightFigures], sizes: Mapping[str, int], progress: Progress | None
) -> dict[str, WeightFigures]:
    found = {}
    with weight_pool(torch.device("cpu")) as run:
        for name, figures in zip(names, run(compare, names), strict=True):
            found[name] = figures
            if progress is not None:
                progress(sizes[name])
    return found


def stored_weights(
    bound: BoundAdapter,
    held: Mapping[str, TensorRef],  # the artefact's tensors by name
    *,
    is_delta: bool = False,
    skipped: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> WeightProof:
    """Every adapted weight but those `skipped` as it lies in a merged model, or its delta in a folder of deltas."""
    modules = modules_by_tensor(bound)
    problems, names = [], []
    held = {name: _as_compared(ref, bound.base.tensors.get(name), modules.get(name)) for name, ref in held.items()}
    for name, items in modules.items():
        ref = held.get(name)
        if name in skipped:
            continue
        if ref is None:
            problems.append(f"{name} is missing")
        elif ref.shape != items[0].weight.shape:
            problems.append(f"{name} has the shape {ref.shape} instead of {items[0].weight.shape}")
        elif ref.dtype not in ("F64", "F32", *HALVES):
            problems.append(f"{name} is stored in {ref.dtype}")
        else:
            names.append(name)
    sources = Sources()

    def compare(name: str) -> WeightFigures:
        items, ref = modules[name], held[name]
        formula = formula_of(items, sources)
        got = lambda first, stop, base: read_rows(sources, ref, first, stop)  # noqa: E731
        return compare_blocks(items[0].weight, formula, got, ref.dtype, sources, is_delta=is_delta)

    try:
        layers = compare_each(names, compare, {name: modules[name][0].weight.nbytes for name in names}, progress)
    finally:
        sources.close()
    return WeightProof(layers, problems + weight_problems(layers), len(layers))


def _as_compared(ref: TensorRef, stored: TensorRef | None, items: Sequence[BoundModule] | None) -> TensorRef:
    """Return the artefact's tensor, as a matrix where the formula has a convolution as one."""
    is_matrix = items is not None and stored is not None and items[0].weight.shape == stored.as_matrix().shape
    return ref.as_matrix() if is_matrix and stored is not None and ref.shape == stored.shape else ref


def merged_weights(bound: BoundAdapter, merged: Checkpoint, progress: Progress | None = None) -> WeightProof:
    """A merged model: adapted weights, everything else, and its config."""
    found = stored_weights(bound, merged.tensors, progress=progress)
    compared, problems = carried_over(bound, merged, progress)
    problems = [*found.problems, *problems, *config_problems(bound, merged)]
    return WeightProof(found.layers, problems, found.compared + compared)


def delta_weights(bound: BoundAdapter, folder: Path, progress: Progress | None = None) -> WeightProof:
    """A folder of deltas."""
    refs = {ref.name: ref for ref in read_weights(folder / "delta.safetensors").tensors}
    extra = sorted(set(refs) - {item.name for item in bound.modules})
    found = stored_weights(bound, refs, is_delta=True, progress=progress)
    problems = [f"{len(extra)} deltas of weights that the adapter does not change, first {extra[0]}"] if extra else []
    return WeightProof(found.layers, [*found.problems, *problems], found.compared)


def weight_problems(layers: Mapping[str, WeightFigures]) -> list[str]:
    """What is wrong with the weights: more than float32 arithmetic and one rounding explain."""
    problems = []
    for half in HALVES:
        bad = [name for name, one in layers.items() if one.dtype == half and not one.excess_ulp <= 0.01]
        problems += [f"{len(bad)} weights beyond one rounding to {half}, first {bad[0]}"] if bad else []
    bad = [
        name for name, one in layers.items() if one.dtype not in HALVES and not one.relative_error <= WEIGHT_TOLERANCE
    ]
    text = f"weights with a relative error of dW above {WEIGHT_TOLERANCE:g}"
    return [*problems, *([f"{len(bad)} {text}, first {bad[0]}"] if bad else [])]
