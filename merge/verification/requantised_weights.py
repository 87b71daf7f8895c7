"""Comparison of a merged model in the base's quantisation: adapted weights with formulas, all others byte for byte.

W' is the adapted weight by the formula in float64, Q the dequantised weight of the artefact. Three conditions hold:

- With the artefact's scales, every element of Q is W' rounded to the nearest value of the scheme, or every element is
  W' rounded at random with the uniform numbers of this weight (quantisation/rounding.py). Near a tie, where float32 and
  float64 may round W' differently, either value is accepted.
- The requantisation_loss of Q is that of the best way to quantise W' again (the base's scales or new ones, rounded to
  the nearest value or at random). This detects wrong scales: if all scales are 0, every Q is correctly rounded.
- The retention <Q - W, dW> / |dW|^2 over all weights is at least the required one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.quantisation.packed_weight import ACCEPTED_LOSS, PackedWeight, replaced_parts, requantisation_loss
from adapter_merge.quantisation.rounding import uniform_numbers
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.tensor_comparison import same_bytes
from adapter_merge.storage.tensor_io import read_bytes, read_tensor

from .compare_weights import Progress, WeightFigures, WeightProof, compare_stored, find_weight_problems
from .unchanged_tensors import find_config_problems
from .whole_formulas import FLOAT32_ERROR, modules_by_tensor, whole_weight

LOSS_MARGIN = 1.01  # allowed ratio to the smallest loss, for the errors of float32
DRAW_NOISE = 1e-3  # steps between two codes: the error of W' in float32
CONFIG_KEYS = ("quantization_config", "compression_config")


def requantised_weights(
    bound: BoundAdapter, merged: Checkpoint, least: float, progress: Progress | None = None
) -> WeightProof:
    """Compare a quantised merged model; least: the required retention."""
    stored, merged_stored = bound.base.stored, merged.stored
    assert merged_stored is not None
    if stored is None:
        return WeightProof({}, ["the artefact is quantised and the base is not"], 0)
    base, made = packed_weights(bound.base), packed_weights(merged)
    adapted = modules_by_tensor(bound)
    packed = {name: items for name, items in adapted.items() if name in base}
    replaced = {name: ref for name, ref in bound.replacements.items() if name in base}
    problems: list[str] = []
    layers: dict[str, WeightFigures] = {}
    for name in (*packed, *replaced):
        if name not in made or made[name].scheme != base[name].scheme:
            problems.append(f"{name} is not quantised as the base's is ({base[name].scheme})")
            continue
        before = read_tensor(bound.base.tensors[name]).to(torch.float64)
        after = whole_weight(packed[name])[1] if name in packed else read_tensor(replaced[name]).to(torch.float64)
        figures, exact = _compare(made[name], before, after.reshape(before.shape))
        layers[name] = figures
        if not exact:
            problems.append(f"{name}: its quantised values are not those that the exact ones round to")
        elif (
            not _compute_loss(figures)
            <= LOSS_MARGIN * _smallest_loss(base[name], before, after.reshape(before.shape)) + 1e-6
        ):
            problems.append(f"{name}: its error is larger than that of the best quantisation of the exact weight")
        if progress is not None:
            progress(bound.base.tensors[name].nbytes)
    total = sum(layer.size**2 for layer in layers.values())
    retained = sum((layer.retention or 0.0) * layer.size**2 for layer in layers.values())
    retention = retained / total if total else 1.0
    if not retention >= least:
        problems.append(f"the quantised weights retain {retention:.2f} of the adapter's change, below {least:g}")
    plain = compare_stored(bound, merged.tensors, skipped=frozenset(packed))
    problems += [*plain.problems, *find_weight_problems(plain.layers), *find_config_problems(bound, merged)]
    for key in CONFIG_KEYS:
        if stored.config.get(key) != merged_stored.config.get(key):
            problems.append(f"config.json: {key} is not the base's")
    written = {part.name for name in layers for part in base[name].parts.values()}
    written |= {*plain.layers, *replaced}
    compared, changed = _compare_unadapted(bound, stored, merged_stored, written)
    return WeightProof(layers | plain.layers, [*problems, *changed], len(layers) + plain.compared + compared)


def _compare(made: PackedWeight, before: Tensor, after: Tensor) -> tuple[WeightFigures, bool]:
    """Return the figures of one weight, and True where its codes are correct roundings; both tensors float64."""
    stored = made.rows(read_bytes, 0, made.row_count).to(torch.float64).reshape(after.shape)
    noise = FLOAT32_ERROR * (before.abs() + (after - before).abs() + float(after.square().mean().sqrt()))
    low, high = _rounded(made, after - noise, None), _rounded(made, after + noise, None)
    exact = bool(((torch.minimum(low, high) <= stored) & (stored <= torch.maximum(low, high))).all())
    if not exact:
        uniform = uniform_numbers(made.name, made.shape)
        above = _rounded(made, after, (uniform - DRAW_NOISE).clamp_(min=0.0))
        below = _rounded(made, after, (uniform + DRAW_NOISE).clamp_(max=1 - 2**-24))
        low, high = torch.minimum(above, below) - noise, torch.maximum(above, below) + noise
        exact = bool(((low <= stored) & (stored <= high)).all())
    figures = _measure(made.scheme, stored, before, after)
    return figures, exact and math.isfinite(figures.relative_error)


def _measure(scheme: str, stored: Tensor, before: Tensor, after: Tensor) -> WeightFigures:
    """Return the figures of a dequantised weight `stored` against W' `after`; `before` is W. All float64."""
    change = after - before
    size = float(torch.linalg.vector_norm(change))
    error = float(torch.linalg.vector_norm(stored - after))
    retention = float(((stored - before) * change).sum()) / size**2 if size else 1.0
    relative = error / size if size else error
    return WeightFigures(relative if math.isfinite(relative) else math.inf, 0.0, scheme, retention, size)


def _compute_loss(figures: WeightFigures) -> float:
    """Return the loss by which ways to quantise are compared."""
    return requantisation_loss(figures.retention or 0.0, figures.relative_error)


def _smallest_loss(weight: PackedWeight, before: Tensor, after: Tensor) -> float:
    """Return the loss of the best way to quantise `after` again, of the ways that engine/requantise.py tries."""
    best: WeightFigures | None = None
    for uniform in (None, uniform_numbers(weight.name, weight.shape)):
        for parts in weight.candidates(after.to(torch.float32), read_bytes, uniform):
            read = replaced_parts(weight.parts, parts, read_bytes)
            candidate = weight.uncached().rows(read, 0, weight.row_count).to(torch.float64).reshape(after.shape)
            figures = _measure(weight.scheme, candidate, before, after)
            if best is None or _compute_loss(figures) < _compute_loss(best):
                best = figures
        if best is not None and abs(1 - (best.retention or 0.0)) < ACCEPTED_LOSS:
            break
    return math.inf if best is None else _compute_loss(best)


def _rounded(made: PackedWeight, after: Tensor, uniform: Tensor | None) -> Tensor:
    """Return `after` rounded with the scales of `made`, at random by `uniform` or to the nearest; float64."""
    parts = next(iter(made.candidates(after.to(torch.float32), read_bytes, uniform)))
    read = replaced_parts(made.parts, parts, read_bytes)
    return made.uncached().rows(read, 0, made.row_count).to(torch.float64).reshape(after.shape)


def _compare_unadapted(
    bound: BoundAdapter, stored: Checkpoint, merged_base: Checkpoint, written: set[str]
) -> tuple[int, list[str]]:
    """Compare the bytes of every stored tensor that the adapter does not change with the base's."""
    expected = {**stored.tensors, **bound.copies, **bound.replacements}
    problems, compared = [], 0
    for name, ref in expected.items():
        written_ref = merged_base.tensors.get(name)
        if name in written and name in stored.tensors:
            if written_ref is None or (written_ref.dtype, written_ref.shape) != (
                stored.tensors[name].dtype,
                stored.tensors[name].shape,
            ):
                problems.append(f"{name} is missing or has another dtype or shape")
            continue
        if written_ref is None:
            problems.append(f"{name} is missing")
            continue
        compared += 1
        if not same_bytes(ref, written_ref):
            problems.append(f"{name} was changed")
    names = {item.name for item in bound.modules}
    problems += [f"{name} was added" for name in merged_base.tensors if name not in expected and name not in names]
    return compared, problems
