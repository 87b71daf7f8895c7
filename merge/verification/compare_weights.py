"""Every adapted weight of an artefact against the methods' formulas in float64, and the rest against the base's bytes.

Streamed: blocks of rows of base and artefact, one worker per core; no whole weight is held but for a combination's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.combined_weight import CombinedModule
from adapter_merge.combine.open_inputs import is_stale_quantization
from adapter_merge.engine.weight_pool import weight_pool
from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.storage.checkpoint import OUTPUT_HEADS, Checkpoint, read_weights
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

from .combination_definition import defined_delta
from .opened_artefact import open_artefact
from .weight_formulas import Adapted, Formula, TensorFormula, read_rows, row_blocks, tensor_formula

WEIGHT_TOLERANCE = 1e-5  # relative error of dW, float32
FLOAT32_ERROR = 8 * 2**-24  # a few roundings of a float32 sum, relative to its terms
UNSURE_SHARE = 1e-2  # of a combined weight: elements beside a threshold, which float32 may take or leave
HALVES = ("BF16", "F16")
OPTIMUM_TOLERANCE = 1e-4  # truncated factors: how far they may be from the optimum, relative to dW
PROJECTION_TOLERANCE = 1e-3  # and how much of their error may lie in their own rows and columns
TRUNCATION = "truncated factors that are not the best of their rank"
DENSE_SIDE = 2048  # above it the singular values come from a randomised decomposition
SPARE = 8  # more directions than are kept: its accuracy
OF_NO_EFFECT = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")  # keys of config.json

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


@dataclass(frozen=True, eq=False)
class _Whole:
    """A weight that was computed whole."""

    weight: Tensor  # (rows, columns) float64
    slack: Tensor | None

    def after(self, base: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        rows = slice(first, first + base.shape[0])
        return self.weight[rows], None if self.slack is None else self.slack[rows]


def modules_by_tensor(bound: BoundAdapter) -> dict[str, list[BoundModule]]:
    """The modules of each tensor that is written: an expert is one of many in its tensor."""
    found: dict[str, list[BoundModule]] = {}
    for item in bound.modules:
        found.setdefault(item.name, []).append(item)
    return found


def formula_of(items: Sequence[BoundModule], sources: Sources) -> Formula:
    """What is done to one tensor. A combination is taken from its definition, which shares nothing with the merge."""
    item = items[0]
    return _combined(item, sources) if isinstance(item, CombinedModule) else tensor_formula(items, sources)


def _combined(item: CombinedModule, sources: Sources) -> _Whole:
    whole = item.combination
    base = read_tensor(item.weight).to(torch.float64)
    rows = base.reshape(1, -1) if base.dim() < 2 else base.reshape(-1, base.shape[-1])

    def alone(share: Any, weight: Tensor) -> Tensor:
        start = weight if share.replacement is None else read_tensor(share.replacement).to(weight).reshape(weight.shape)
        return tensor_formula(share.modules, sources).after(start, 0)[0] if share.modules else start

    if whole.in_turn:
        after = rows
        for share in whole.shares:
            after = alone(share, after)
        return _Whole(after, None)
    deltas = [alone(share, rows) - rows for share in whole.shares]
    noise = sum((delta.abs() for delta in deltas), rows.abs() + _typical(rows)) * FLOAT32_ERROR
    parts = whole.parts([share.edit(torch.float64) for share in whole.shares])
    combined, unsure = defined_delta(deltas, parts, whole.settings, noise)
    taken = float(unsure.float().mean()) <= UNSURE_SHARE
    return _Whole(rows + combined, torch.where(unsure, math.inf, 0.0).to(torch.float64) if taken else None)


def whole_weight(items: Sequence[BoundModule]) -> tuple[Tensor, Tensor, Tensor | None]:
    """W0, W' and the slack of W' (see Formula) of one stored tensor in float64, whole, as it is stored."""
    sources = Sources()
    try:
        ref = items[0].weight
        base = read_tensor(ref).to(torch.float64)
        after, slack = formula_of(items, sources).after(base.reshape(ref.rows, -1), 0)
        return base, after.reshape(base.shape), None if slack is None else slack.reshape(base.shape)
    finally:
        sources.close()


def _typical(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight)) / math.sqrt(max(1, weight.numel()))


def _compare(
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
        found = stored.to(torch.float64)
        off = (found - wanted).abs()
        if slack is not None:
            off = (off - slack).clamp_min(0)
        size += float(change.square().sum())
        error += float(off.square().sum())
        wrong = off != 0 if stored.dtype == torch.float64 else (wanted.to(kept) != stored)
        if bool(wrong.any()):
            places = wrong.nonzero(as_tuple=True)
            excess = max(excess, float(_excess(wanted[places], off[places], base[places], change[places], kept, base)))
    if math.isnan(error) or math.isnan(excess):
        return WeightFigures(math.inf, math.inf, dtype)
    return WeightFigures(math.sqrt(error / size) if size else math.sqrt(error), excess, dtype)


def _excess(wanted: Tensor, off: Tensor, base: Tensor, change: Tensor, kept: torch.dtype, block: Tensor) -> Tensor:
    """The worst of `off` beyond float32 arithmetic and half an ulp, in ulp; NaN where something is NaN."""
    _, exponent = torch.frexp(wanted.abs().clamp_min(torch.finfo(kept).tiny))
    ulp = torch.ldexp(torch.full_like(wanted, torch.finfo(kept).eps), exponent - 1)
    # Where W0 and dW cancel, float32 arithmetic is off by parts of their size, not of the small result's.
    arithmetic = FLOAT32_ERROR * (base.abs() + change.abs() + _typical(block))
    found = (off - arithmetic) / ulp - 0.5
    return found.max().clamp_min(0) if not bool(found.isnan().any()) else found.new_tensor(math.nan)


def _each(
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
        return _compare(items[0].weight, formula, got, ref.dtype, sources, is_delta=is_delta)

    try:
        layers = _each(names, compare, {name: modules[name][0].weight.nbytes for name in names}, progress)
    finally:
        sources.close()
    return WeightProof(layers, problems + weight_problems(layers), len(layers))


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


def adapter_weights(
    bound: BoundAdapter, other: BoundAdapter, progress: Progress | None = None
) -> tuple[WeightProof, dict[str, tuple[BoundModule, BoundModule]]]:
    """Another adapter (factors, a converted folder) on the same base: W' of both, heads and biases.

    Returns the proof, whose problems are those of heads and of names, and the weights of both by name.
    """
    if isinstance(bound, CombinedBound):
        wanted: dict[str, list[BoundModule]] = {item.name: [item] for item in bound.factor_modules()}
        whole = bound.whole_tensors()
    else:
        wanted, whole = modules_by_tensor(bound), {}
    theirs = modules_by_tensor(other)
    heads = sorted({*bound.replacements, *whole, *other.replacements})
    different = [name for name in heads if not _same_head(name, bound, whole, other)]
    extra, missing = sorted(set(theirs) - set(wanted)), sorted(set(wanted) - set(theirs))
    saved = bound.adapter.base_layers
    layers_saved = [
        name
        for name, ref in other.adapter.base_layers.items()
        if name in saved and not torch.equal(read_tensor(ref), read_tensor(saved[name]))
    ]
    problems = [
        f"{len(names)} {what}, first {names[0]}"
        for names, what in (
            (layers_saved, "saved layers of the base are different"),
            (different, "heads or biases are different or missing"),
            (extra, "weights that the adapter does not change are changed"),
            (missing, "weights that the adapter changes are missing"),
        )
        if names
    ]
    sources = Sources()

    def compare(name: str) -> WeightFigures:
        one, two = formula_of(wanted[name], sources), formula_of(theirs[name], sources)
        got = lambda first, stop, base: two.after(base, first)[0]  # noqa: E731
        return _compare(wanted[name][0].weight, one, got, "F64", sources)

    names = [name for name in wanted if name in theirs]
    try:
        layers = _each(names, compare, {name: wanted[name][0].weight.nbytes for name in names}, progress)
    finally:
        sources.close()
    proof = WeightProof(layers, problems, len(layers) + len(heads))
    return proof, {name: (wanted[name][0], theirs[name][0]) for name in names}


def factor_weights(bound: BoundAdapter, folder: Path, progress: Progress | None = None) -> WeightProof:
    """Low-rank factors on the original base: exact, or the best of their rank. What the folder says of itself is not
    looked at: truncated factors are held against the optimum, which is computed from the adapter (`not_optimal`)."""
    other = open_artefact(bound, folder, "original")
    proof, pairs = adapter_weights(bound, other, progress)
    problems = [*proof.problems, *_beside_factors(bound, other, folder)]
    inexact = [name for name, one in proof.layers.items() if not one.relative_error <= WEIGHT_TOLERANCE]
    worse = [(name, reason) for name in inexact if (reason := not_optimal(*pairs[name])) is not None]
    if worse:
        name, reason = worse[0]
        problems.append(f"{TRUNCATION}: {len(worse)} weights, first {name}: {reason}")
    return WeightProof(proof.layers, problems, proof.compared)


def not_optimal(item: BoundModule, factors: BoundModule) -> str | None:
    """Why inexact factors F are not the best ones of their rank R; None where they are.

    F is a best approximation of dW (Eckart and Young, 1936) when its error is the least that rank R can have, and the
    rest dW - F has nothing in F's rows and columns: F^T (dW - F) = 0 and (dW - F) F^T = 0. Under a magnitude this holds
    of the adapter's own low-rank part, and the scale must be the exact one.
    """
    if item.rows is not None or factors.rows is not None:
        return "an expert or a part of a tensor is not truncated"
    wanted, exact_scale = _direction(item)
    delta, scale = _direction(factors)
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
        near = [one for one in (exact_scale, _direction(item, rounded=True)[1]) if one is not None]
        off = min(float(torch.linalg.vector_norm(scale - one) / torch.linalg.vector_norm(one)) for one in near)
        if not off <= WEIGHT_TOLERANCE:
            return f"the scale is off by {off:.3g}"
        wanted, delta = wanted * scale, delta * scale  # the best of what is served
    size, rest = torch.linalg.vector_norm(wanted), wanted - delta
    if not float(size):
        return "the adapter does not change it"
    error, best = float(torch.linalg.vector_norm(rest) / size), _best_error(wanted, factors.module.rank)
    if not error <= best + OPTIMUM_TOLERANCE:
        return f"relative error {error:.3g}, possible {best:.3g}"
    overlap = max(float(torch.linalg.vector_norm(one)) for one in (delta.T @ rest, rest @ delta.T)) / float(size) ** 2
    return f"not a projection of dW, by {overlap:.3g}" if not overlap <= PROJECTION_TOLERANCE else None


def _direction(item: BoundModule, *, rounded: bool = False) -> tuple[Tensor, Tensor | None]:
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


def _beside_factors(bound: BoundAdapter, other: BoundAdapter, folder: Path) -> list[str]:
    """What lies beside the factors, for servers and exports: it must say the same as the factors themselves."""
    problems = []
    heads = folder / REPLACEMENTS
    if heads.is_file():
        for ref in read_weights(heads).tensors:
            own = other.replacements.get(ref.name)
            if own is None or own.shape != ref.shape or not torch.equal(read_tensor(own), read_tensor(ref)):
                problems.append(f"{REPLACEMENTS}: {ref.name} is not the one in the adapter's own file")
    scales = folder / "row_scale.safetensors"
    if scales.is_file():
        modules = {item.module.name: item for item in other.modules}
        for ref in read_weights(scales).tensors:
            item = modules.get(ref.name.removeprefix(PREFIX).removesuffix(".row_scale"))
            scale = None if item is None else _direction(item)[1]
            scale = None if scale is None else scale.reshape(-1)
            stated = read_tensor(ref).to(torch.float64)
            if (
                scale is None
                or scale.shape != stated.shape
                or not bool(((stated - scale).abs() <= WEIGHT_TOLERANCE * scale.abs()).all())
            ):
                problems.append(f"row_scale.safetensors: {ref.name} is not what the factors and magnitudes give")
    return problems


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


def carried_over(bound: BoundAdapter, merged: Checkpoint, progress: Progress | None = None) -> tuple[int, list[str]]:
    """How many tensors that are not adapted were compared, and which are missing, added or changed."""
    edited = {item.name for item in bound.modules}
    expected = {**bound.base.tensors, **bound.copies, **bound.replacements}
    tied = expected_config(bound).get("tie_word_embeddings")
    problems, compared = [], 0
    sources = Sources()
    try:
        for name, ref in expected.items():
            found = merged.tensors.get(name)
            if name in edited:
                continue
            if found is None:
                if not (name.endswith(OUTPUT_HEADS) and tied):
                    problems.append(f"{name} is missing")
                continue
            compared += 1
            if not _same(ref, found, sources):
                problems.append(f"{name} was changed")
            if progress is not None:
                progress(ref.nbytes)
    finally:
        sources.close()
    problems += [f"{name} was added" for name in merged.tensors if name not in expected and name not in edited]
    return compared, problems


def expected_config(bound: BoundAdapter) -> dict[str, Any]:
    """What the merged model's config.json must say: the base's, and what the adapter changes of it."""
    config = dict(bound.base.config)
    if is_stale_quantization(bound.base):
        config.pop("quantization_config", None)
    for key, value in bound.config_changes.items():
        inner = config.get("text_config")
        if isinstance(inner, dict) and key not in config:
            config["text_config"] = {**inner, key: value}
        else:
            config[key] = value
    return config


def config_problems(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Settings of the merged model that neither the base nor the adapter has: the same weights, another model."""
    wanted, found = expected_config(bound), dict(merged.config)
    keys = sorted({*wanted, *found} - set(OF_NO_EFFECT))
    bad = [key for key in keys if wanted.get(key) != found.get(key)]
    return [f"config.json: {key} is {found.get(key)!r} instead of {wanted.get(key)!r}" for key in bad]


def _same(ref: TensorRef, found: TensorRef, sources: Sources) -> bool:
    if ref.dtype == found.dtype:
        return same_bytes(ref, found)
    if ref.shape != found.shape or found.dtype not in ("F64", "F32", *HALVES):
        return False
    kept = TORCH_DTYPES[found.dtype]
    return all(
        torch.equal(read_rows(sources, ref, *rows).to(kept), read_rows(sources, found, *rows))
        for rows in row_blocks(ref)
    )


def _same_head(name: str, bound: BoundAdapter, whole: Mapping[str, Tensor], other: BoundAdapter) -> bool:
    found = other.replacements.get(name)
    if found is None:
        return False
    if name in whole:
        return whole[name].shape == found.shape and torch.equal(whole[name], read_tensor(found))
    if name not in bound.replacements:
        return False
    sources = Sources()
    try:
        return _same(bound.replacements[name], found, sources)
    finally:
        sources.close()
