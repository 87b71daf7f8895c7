"""Combinations computed from their definition, on whole tensors in float64, by sorting; only `verify` uses this file.

It shares only the random numbers with delta_ops.py: it uses no blocks, no histograms and no factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_merge.combine.delta_ops import Settings, WeightedEdit, random_keep

NEAR = 2.0**-18  # relative distance from a threshold within which float32 may decide either way


def defined_delta(
    deltas: Sequence[Tensor],  # each of the tensor's shape, float64: every adapter's own W' - W0
    parts: Sequence[WeightedEdit],  # their weights, densities and random numbers; the edits are not used
    settings: Settings,
    noise: Tensor | float = 0.0,  # of the tensor's shape: the possible error of float32 arithmetic
) -> tuple[Tensor, Tensor]:
    """Return the combined delta, and a mask of the elements for which float32 may decide otherwise.

    These elements are near a threshold, or their sum is near 0.
    """
    unsure = torch.zeros_like(deltas[0], dtype=torch.bool)
    terms = []
    for delta, part in zip(deltas, parts, strict=True):
        keep_mask = torch.ones_like(delta, dtype=torch.bool)
        if settings.by_size:
            dropped = int(settings.gamma * delta.numel()) if settings.method == "breadcrumbs" else 0
            count = int(part.density * delta.numel())
            for edge in (dropped, min(delta.numel(), dropped + count)):
                unsure |= _mark_near_edge(delta, edge, noise)
            order = delta.abs().flatten().to(torch.float32).argsort(descending=True, stable=True)
            chosen = torch.zeros(delta.numel(), dtype=torch.bool)
            chosen[order[dropped : dropped + count]] = True
            keep_mask = chosen.view_as(delta)
        elif settings.random and part.density < 1:
            keep_mask = random_keep(part.key, part.density, 0, delta.numel(), delta.device).view_as(delta)
            delta = delta / part.density
        terms.append(part.weight * delta * keep_mask)
    total = torch.stack(terms).sum(0)
    if not settings.elects or len(terms) == 1:
        return total, unsure
    sizes = torch.stack(terms).abs().sum(0)
    unsure |= (total.abs() <= NEAR * sizes + noise) & (sizes > 0)
    weight, mean = torch.zeros_like(total), torch.zeros_like(total)
    for term, part in zip(terms, parts, strict=True):
        agrees = torch.sign(term) * torch.sign(total) > 0
        weight += abs(part.weight) * agrees.to(weight.dtype)
        mean += torch.where(agrees, term, 0)
    weight_sum = sum(abs(part.weight) for part in parts)
    return torch.where(weight > 0, mean / weight.clamp_min(torch.finfo(weight.dtype).tiny), 0) * weight_sum, unsure


def _mark_near_edge(delta: Tensor, edge: int, noise: Tensor | float) -> Tensor:
    """Return a mask of elements whose magnitude may fall on the other side of the edge-th largest."""
    size = delta.abs()
    if not 0 < edge < delta.numel():
        return torch.zeros_like(size, dtype=torch.bool)
    flat = size.flatten()
    last, first = (flat.kthvalue(delta.numel() - edge + place).values for place in (1, 0))
    margin = NEAR * last + noise
    return (size <= last + margin) & (size >= first - margin)
