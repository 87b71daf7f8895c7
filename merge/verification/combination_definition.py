"""Combinations by their definition: whole tensors in float64, by sorting. Used by proofs only, since it is slow.

It shares the random numbers with delta_ops.py, and nothing else: no blocks, no histograms, no factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_merge.combine.delta_ops import Settings, WeightedEdit, random_keep

NEAR = 2.0**-18  # of its size: an element this close to a threshold may fall on either side in float32


def defined_delta(
    deltas: Sequence[Tensor],  # each of the tensor's shape, float64: every adapter's own W' - W0
    parts: Sequence[WeightedEdit],  # their weights, densities and random numbers; the edits are not looked at
    settings: Settings,
    noise: Tensor | float = 0.0,  # of the tensor's shape: what float32 arithmetic may be off by
) -> tuple[Tensor, Tensor]:
    """Return the combined delta, and a mask of elements so near a threshold or a sign that float32 may differ."""
    unsure = torch.zeros_like(deltas[0], dtype=torch.bool)
    terms = []
    for delta, part in zip(deltas, parts, strict=True):
        kept = torch.ones_like(delta, dtype=torch.bool)
        if settings.by_size:
            dropped = int(settings.gamma * delta.numel()) if settings.method == "breadcrumbs" else 0
            count = int(part.density * delta.numel())
            for edge in (dropped, min(delta.numel(), dropped + count)):
                unsure |= _beside(delta, edge, noise)
            order = delta.abs().flatten().to(torch.float32).argsort(descending=True, stable=True)
            chosen = torch.zeros(delta.numel(), dtype=torch.bool)
            chosen[order[dropped : dropped + count]] = True
            kept = chosen.view_as(delta)
        elif settings.random and part.density < 1:
            kept = random_keep(part.key, part.density, 0, delta.numel(), delta.device).view_as(delta)
            delta = delta / part.density
        terms.append(part.weight * delta * kept)
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
    everything = sum(abs(part.weight) for part in parts)
    return torch.where(weight > 0, mean / weight.clamp_min(torch.finfo(weight.dtype).tiny), 0) * everything, unsure


def _beside(delta: Tensor, edge: int, noise: Tensor | float) -> Tensor:
    """Return a mask of elements whose magnitude may fall on the other side of the edge-th largest."""
    size = delta.abs()
    if not 0 < edge < delta.numel():
        return torch.zeros_like(size, dtype=torch.bool)
    flat = size.flatten()
    last, first = (flat.kthvalue(delta.numel() - edge + place).values for place in (1, 0))
    room = NEAR * last + noise
    return (size <= last + room) & (size >= first - room)
