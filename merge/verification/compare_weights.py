"""Comparison of an artefact's weights: adapted ones with the methods' formulas in float64, all others with the base.

Base and artefact are read in blocks of rows, with one worker per core. Only combinations need whole weights in memory.

    whole_formulas.py   the formula of each stored tensor
    unchanged_tensors.py   tensors that are not adapted, and the config
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

from .unchanged_tensors import HALVES, compare_unadapted, find_config_problems, find_dtype_problems
from .weight_formulas import Formula, read_rows, row_blocks
from .whole_formulas import FLOAT32_ERROR, formula_of, modules_by_tensor, typical_size

WEIGHT_TOLERANCE = 1e-5  # relative error of dW, float32

Progress = Callable[[int], None]  # called with bytes that were compared


@dataclass(frozen=True)
class WeightFigures:
    """The difference between one adapted weight of the artefact and the exact weight."""

    relative_error: float  # ||W' - exact|| / ||dW||
    excess_ulp: float  # worst element beyond float32 arithmetic and one correct rounding, in ulp of the dtype
    dtype: str  # as the artefact stores it, or its quantisation scheme
    retention: float | None = None  # <Q(W') - W, dW> / |dW|^2 of a weight that was quantised again
    size: float = 0.0  # |dW| of such a weight


@dataclass(frozen=True)
class WeightProof:
    """The figures of all compared weights, and the problems."""

    layers: dict[str, WeightFigures]
    problems: list[str] = field(default_factory=list)
    compared: int = 0  # number of compared tensors, replaced ones included

    @property
    def is_requantised(self) -> bool:
        """True where adapted weights are quantised; no tolerance of logits can be stated for them."""
        return any(figures.retention is not None for figures in self.layers.values())

    @property
    def half(self) -> str | None:
        """BF16 or F16 where an adapted weight is kept in half precision."""
        return next((name for name in HALVES if any(figures.dtype == name for figures in self.layers.values())), None)


def compare_blocks(
    ref: TensorRef,  # of W0
    exact: Formula,
    got: Callable[[int, int, Tensor], Tensor],  # (first, stop, W0's rows in float64) -> the artefact's, in its dtype
    dtype: str,
    sources: Sources,
    *,
    is_delta: bool = False,
) -> WeightFigures:
    """Compare the artefact's rows, which `got` returns, with those of the formula `exact` on the base weight `ref`."""
    kept = TORCH_DTYPES[dtype]
    size, error, excess = 0.0, 0.0, 0.0
    for first, stop in row_blocks(ref):
        base = read_rows(sources, ref, first, stop).to(torch.float64)
        after, slack = exact.after(base, first)
        change = after - base
        stored = got(first, stop, base)
        wanted = change if is_delta else after
        off = stored.to(torch.float64, copy=True).sub_(wanted)
        if slack is not None:
            off = (off.abs() - slack).clamp_min(0)
        size += _square(change)
        error += _square(off)
        places = _differing(wanted.to(kept), stored)
        if places.numel():
            context = base.reshape(-1)[places], change.reshape(-1)[places], kept, base
            excess = max(excess, float(_excess(wanted.reshape(-1)[places], off.reshape(-1)[places].abs(), *context)))
    if math.isnan(error) or math.isnan(excess):
        return WeightFigures(math.inf, math.inf, dtype)
    return WeightFigures(math.sqrt(error / size) if size else math.sqrt(error), excess, dtype)


def _differing(rounded: Tensor, stored: Tensor) -> Tensor:
    """Return flat indices (n,) that include all elements whose bits differ; both tensors have one shape and dtype.

    Integers of 8 bytes are compared, so up to three equal neighbours are included too. Comparing bfloat16 elements and
    finding the unequal ones takes ten times as long, and longer than all else in a block but the product.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.element_size()]
    bits = rounded.reshape(-1).view(integer) ^ stored.reshape(-1).view(integer)
    group = 8 // stored.element_size()
    if bits.numel() % group:
        return bits.nonzero()[:, 0]
    return (bits.view(torch.int64).nonzero() * group + torch.arange(group)).reshape(-1)


def _square(block: Tensor) -> float:
    """Return the sum of squares of a block of float64."""
    flat = block.reshape(-1)
    return float(flat.dot(flat))


def _excess(wanted: Tensor, off: Tensor, base: Tensor, change: Tensor, kept: torch.dtype, block: Tensor) -> Tensor:
    """Return the largest error `off` beyond float32 arithmetic and half an ulp, in ulp; NaN where a value is NaN."""
    _, exponent = torch.frexp(wanted.abs().clamp_min(torch.finfo(kept).tiny))
    ulp = torch.ldexp(torch.full_like(wanted, torch.finfo(kept).eps), exponent - 1)
    # Where W0 and dW cancel, the error of float32 arithmetic is relative to their size, not to that of the result.
    arithmetic = FLOAT32_ERROR * (base.abs() + change.abs() + typical_size(block))
    excess = (off - arithmetic) / ulp - 0.5
    return excess.max().clamp_min(0) if not bool(excess.isnan().any()) else excess.new_tensor(math.nan)


def compare_each(
    names: Sequence[str], compare: Callable[[str], WeightFigures], sizes: Mapping[str, int], progress: Progress | None
) -> dict[str, WeightFigures]:
    """Return `compare(name)` for each name, computed in parallel; sizes: bytes of each weight, for `progress`."""
    layers = {}
    with weight_pool(torch.device("cpu")) as run:
        for name, figures in zip(names, run(compare, names), strict=True):
            layers[name] = figures
            if progress is not None:
                progress(sizes[name])
    return layers


def compare_stored(
    bound: BoundAdapter,
    stored: Mapping[str, TensorRef],  # the artefact's tensors by name
    *,
    is_delta: bool = False,
    skipped: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> WeightProof:
    """Compare every adapted weight except `skipped` in a merged model, or its delta in a folder of deltas."""
    modules = modules_by_tensor(bound)
    problems, names = [], []
    refs = {name: _as_matrix(ref, bound.base.tensors.get(name), modules.get(name)) for name, ref in stored.items()}
    for name, items in modules.items():
        ref = refs.get(name)
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
        items, ref = modules[name], refs[name]
        for each in (items[0].weight, ref):
            sources.read_ahead(each)
        formula = formula_of(items, sources)
        got = lambda first, stop, base: read_rows(sources, ref, first, stop)  # noqa: E731
        return compare_blocks(items[0].weight, formula, got, ref.dtype, sources, is_delta=is_delta)

    try:
        layers = compare_each(names, compare, {name: modules[name][0].weight.nbytes for name in names}, progress)
    finally:
        sources.close()
    return WeightProof(layers, problems + find_weight_problems(layers), len(layers))


def _as_matrix(ref: TensorRef, stored: TensorRef | None, items: Sequence[BoundModule] | None) -> TensorRef:
    """Return the artefact's tensor; a convolution is a matrix where its formula computes a matrix."""
    is_matrix = items is not None and stored is not None and items[0].weight.shape == stored.as_matrix().shape
    return ref.as_matrix() if is_matrix and stored is not None and ref.shape == stored.shape else ref


def compare_merged(bound: BoundAdapter, merged: Checkpoint, progress: Progress | None = None) -> WeightProof:
    """Compare a merged model: adapted weights, all other tensors, and its config."""
    proof = compare_stored(bound, merged.tensors, progress=progress)
    compared, problems = compare_unadapted(bound, merged, progress)
    config = find_config_problems(bound, merged)
    problems = [*proof.problems, *problems, *config, *find_dtype_problems(bound, merged)]
    return WeightProof(proof.layers, problems, proof.compared + compared)


def compare_deltas(bound: BoundAdapter, folder: Path, progress: Progress | None = None) -> WeightProof:
    """Compare a folder of deltas."""
    refs = {ref.name: ref for ref in read_weights(folder / "delta.safetensors").tensors}
    extra = sorted(set(refs) - {item.name for item in bound.modules})
    proof = compare_stored(bound, refs, is_delta=True, progress=progress)
    problems = [f"{len(extra)} deltas of weights that the adapter does not change, first {extra[0]}"] if extra else []
    return WeightProof(proof.layers, [*proof.problems, *problems], proof.compared)


def find_weight_problems(layers: Mapping[str, WeightFigures]) -> list[str]:
    """Return a problem for weights with a larger error than float32 arithmetic and one rounding can cause."""
    problems = []
    for half in HALVES:
        bad = [name for name, item in layers.items() if item.dtype == half and not item.excess_ulp <= 0.01]
        problems += [f"{len(bad)} weights beyond one rounding to {half}, first {bad[0]}"] if bad else []
    bad = [
        name
        for name, item in layers.items()
        if item.dtype not in HALVES and not item.relative_error <= WEIGHT_TOLERANCE
    ]
    text = f"weights with a relative error of dW above {WEIGHT_TOLERANCE:g}"
    return [*problems, *([f"{len(bad)} {text}, first {bad[0]}"] if bad else [])]
