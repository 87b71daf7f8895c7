"""Every adapted weight of an artefact against the canonical form in float64, and the rest against the base's bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.binding.embeddings import text_config
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.combined_weight import CombinedModule
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import ParityError
from adapter_merge.methods.block_edits import applied
from adapter_merge.storage.checkpoint import OUTPUT_HEADS, Checkpoint, read_weights
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

from .combination_definition import defined_delta

WEIGHT_TOLERANCE = 1e-5  # relative error of dW, float32
FLOAT32_ERROR = 8 * 2**-24  # a few roundings of a float32 sum, relative to its terms
UNSURE_SHARE = 1e-2  # of a combined weight: elements beside a threshold, which float32 may take or leave


@dataclass(frozen=True)
class WeightFigures:
    """One adapted weight of the artefact against the exact one."""

    relative_error: float  # ||W' - exact|| / ||dW||
    excess_ulp: float  # worst element beyond float32 arithmetic and one correct rounding, in ulp of the dtype


def half_dtype(bound: BoundAdapter, tensors: Mapping[str, TensorRef]) -> str | None:
    """BF16 or F16 where an adapted weight is kept in half precision."""
    dtypes = {tensors[item.name].dtype for item in bound.modules if item.name in tensors}
    halves = sorted(dtypes & {"BF16", "F16"})
    return halves[0] if halves else None


@dataclass(frozen=True, eq=False)
class Exact:
    """One weight in float64, as stored."""

    base: Tensor  # W0
    after: Tensor  # W'
    unsure: Tensor | None = None  # bool: elements of a combination that float32 may decide otherwise


def exact_weight(item: BoundModule) -> Exact:
    """W0 and W'. A combination is taken from its definition, which shares nothing with what merges it."""
    base = read_tensor(item.weight).to(torch.float64)
    if not isinstance(item, CombinedModule):
        return Exact(base, applied(item.stored_edit(torch.float64), base))
    rows = base.reshape(1, -1) if base.dim() < 2 else base
    whole = item.combination
    edits = [share.edit(torch.float64) for share in whole.shares]
    if whole.in_turn:
        after = rows
        for edit in edits:
            after = applied(edit, after)
        return Exact(base, after.reshape(base.shape))
    deltas = [applied(edit, rows) - rows for edit in edits]
    noise = sum((delta.abs() for delta in deltas), rows.abs() + _typical(rows)) * FLOAT32_ERROR
    combined, unsure = defined_delta(deltas, whole.parts(edits), whole.settings, noise)
    return Exact(base, (rows + combined).reshape(base.shape), unsure.reshape(base.shape))


def _typical(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight)) / math.sqrt(max(1, weight.numel()))


def _figures(
    base: Tensor, exact: Tensor, got: Tensor, dtype: torch.dtype, unsure: Tensor | None = None
) -> WeightFigures:
    if unsure is not None and float(unsure.float().mean()) <= UNSURE_SHARE:
        got = torch.where(unsure, exact, got)
    size = float(torch.linalg.vector_norm(exact - base))
    error = float(torch.linalg.vector_norm(got - exact))
    _, exponent = torch.frexp(exact.abs().clamp_min(torch.finfo(dtype).tiny))
    ulp = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)
    # Where W0 and dW cancel, float32 arithmetic is off by parts of their size, not of the small result's.
    typical = _typical(base)
    arithmetic = FLOAT32_ERROR * (base.abs() + (exact - base).abs() + typical)
    excess = float((((got - exact).abs() - arithmetic) / ulp - 0.5).max())
    if math.isnan(error) or math.isnan(excess):
        return WeightFigures(math.inf, math.inf)
    return WeightFigures(error / size if size else error, max(0.0, excess))


def merged_weights(bound: BoundAdapter, merged: Checkpoint) -> dict[str, WeightFigures]:
    layers = {}
    for item in bound.modules:
        ref = merged.tensors.get(item.name)
        if ref is None:
            layers[item.name] = WeightFigures(math.inf, math.inf)
            continue
        exact = exact_weight(item)
        dtype = TORCH_DTYPES[ref.dtype]
        got = read_tensor(ref).to(torch.float64)
        layers[item.name] = _figures(exact.base, exact.after, got, dtype, exact.unsure)
    return layers


def delta_weights(bound: BoundAdapter, folder: Path) -> tuple[dict[str, WeightFigures], str | None]:
    """The figures, and the half precision that the deltas are kept in."""
    refs = {ref.name: ref for ref in read_weights(folder / "delta.safetensors").tensors}
    extra = sorted(set(refs) - {item.name for item in bound.modules})
    if extra:
        raise ParityError(f"{folder}: has deltas of weights that the adapter does not change", got=", ".join(extra[:5]))
    layers = {}
    for item in bound.modules:
        if item.name not in refs:
            layers[item.name] = WeightFigures(math.inf, math.inf)
            continue
        exact = exact_weight(item)
        got = read_tensor(refs[item.name]).to(torch.float64)
        zero, dtype = torch.zeros_like(exact.base), TORCH_DTYPES[refs[item.name].dtype]
        layers[item.name] = _figures(zero, exact.after - exact.base, got, dtype, exact.unsure)
    return layers, half_dtype(bound, refs)


def factor_weights(bound: BoundAdapter, folder: Path) -> dict[str, WeightFigures]:
    factors = open_pair(bound.base.folder, folder, "original")
    by_name = {item.name: item for item in factors.modules}
    if isinstance(bound, CombinedBound):
        wanted: tuple[BoundModule, ...] = bound.factor_modules()
        whole = bound.whole_tensors()
    else:
        wanted, whole = bound.modules, {}
    extra = sorted(set(by_name) - {item.name for item in wanted})
    heads = [
        name
        for name in sorted({*bound.replacements, *whole, *factors.replacements})
        if name not in factors.replacements
        or not (
            _same_values(whole[name], factors.replacements[name])
            if name in whole
            else name in bound.replacements and _same(bound.replacements[name], factors.replacements[name])
        )
    ]
    if extra or heads:
        raise ParityError(
            f"{folder}: holds other tensors than the adapter",
            expected="the adapter's weights, heads and biases",
            got=f"different or missing: {', '.join([*extra, *heads][:5])}",
        )
    layers = {}
    for item in wanted:
        if item.name not in by_name:
            layers[item.name] = WeightFigures(math.inf, math.inf)
            continue
        exact = exact_weight(item)
        got = by_name[item.name].stored_form(torch.float64).merged(exact.base)
        layers[item.name] = _figures(exact.base, exact.after, got, torch.float32)
    return layers


def weight_problems(layers: Mapping[str, WeightFigures], half: str | None) -> list[str]:
    """What is wrong with the weights: more than float32 arithmetic and one rounding explain."""
    if half:
        bad = [name for name, figures in layers.items() if not figures.excess_ulp <= 0.01]
        text = f"weights beyond one rounding to {half}"
    else:
        bad = [name for name, figures in layers.items() if not figures.relative_error <= WEIGHT_TOLERANCE]
        text = f"weights with a relative error of dW above {WEIGHT_TOLERANCE:g}"
    return [f"{len(bad)} {text}, first {bad[0]}"] if bad else []


def carried_over(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Tensors that the merged model lacks or changed without being told to, and settings that its config must have."""
    edited = {item.name for item in bound.modules}
    problems = [
        f"config.json: {key} is {merged.config.get(key)!r}, not {value!r}"
        for key, value in bound.config_changes.items()
        if text_config(merged.config).get(key, merged.config.get(key)) != value
    ]
    for name, ref in {**bound.base.tensors, **bound.copies, **bound.replacements}.items():
        found = merged.tensors.get(name)
        if found is None:
            if not (name.endswith(OUTPUT_HEADS) and merged.config.get("tie_word_embeddings")):
                problems.append(f"{name} is missing")
        elif name not in edited and not _same(ref, found):
            problems.append(f"{name} was changed")
    return problems


def _same(ref: TensorRef, found: TensorRef) -> bool:
    if ref.dtype == found.dtype:
        return same_bytes(ref, found)
    return ref.shape == found.shape and torch.equal(read_tensor(ref).to(TORCH_DTYPES[found.dtype]), read_tensor(found))


def _same_values(value: Tensor, found: TensorRef) -> bool:
    return value.shape == found.shape and torch.equal(value, read_tensor(found))
