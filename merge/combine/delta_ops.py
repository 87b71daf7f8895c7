"""Combination of several adapters of one weight in delta space: W' = W0 + combine(dW_1, ..., dW_n), by blocks of rows.

Each dW_i = W'_i - W0 is that adapter's whole effect on the original base: its own scale, rsLoRA, norms and magnitudes.

linear           sum w_i dW_i
magnitude-prune  linear, where each dW_i keeps only its share `density` of largest elements by magnitude
breadcrumbs      magnitude-prune that first drops the share `gamma` of largest elements (arXiv 2312.06795)
dare             each element is dropped with probability 1 - density, the others divided by density (arXiv 2311.03099)
ties             magnitude-prune; then the sign of sum w_i dW_i is elected per element, and the result is the weighted
                 mean of the elements that agree with it, times sum |w_i| (arXiv 2306.01708, where
                 lambda = sum |w_i|); with weights that add up to 1 this is also mergekit's normalised form
dare-ties        the random dropping of dare, then the election of ties

Thresholds are exact for the whole tensor although only blocks of it are in memory: the k-th largest magnitude follows
from two histograms of float32 bit patterns (which sort like magnitudes), with one pass over the blocks for each.
Elements equal to a threshold are all kept. Random numbers are a hash (SplitMix64) of seed, adapter, tensor and element,
so that blocks, workers and devices do not affect them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.storage.random_numbers import BITS, random_bits

from .combination_settings import METHODS as METHODS
from .combination_settings import Settings as Settings

HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15  # of the 31 bits of a float32's size


@dataclass(frozen=True, eq=False)
class WeightedEdit:
    """The edit of one adapter with its weight and density in a combination."""

    edit: BlockEdit
    weight: float
    density: float
    key: int  # of the random numbers, see `key_of`

    @property
    def keeps_all(self) -> bool:
        """True when no element is dropped."""
        return self.density >= 1


def combine_edits(parts: Sequence[WeightedEdit], settings: Settings) -> BlockEdit | None:
    """Return one edit for all `parts`; None where every weight or density is 0.

    Callers sort the parts by name, so that the result does not depend on the order in which they are given.
    """
    parts = [part for part in parts if part.weight != 0 and part.density > 0]
    keeps_all = all(part.keeps_all for part in parts) and settings.gamma == 0
    if not parts:
        return None
    linear = not settings.elects or len(parts) == 1
    if linear and keeps_all:
        if len(parts) == 1 and parts[0].weight == 1:
            return parts[0].edit
        forms = [part.edit for part in parts if isinstance(part.edit, CanonicalForm)]
        if len(forms) == len(parts) and all(form.is_low_rank and form.residual is None for form in forms):
            return CanonicalForm(
                torch.cat([form.up * part.weight for form, part in zip(forms, parts, strict=True)], dim=1),
                torch.cat([form.down for form in forms]),
            )
    return CombinedEdit(tuple(parts), settings, pending=2 if settings.by_size and not keeps_all else 0)


@dataclass(frozen=True, eq=False)
class CombinedEdit:
    """A combination of several edits of one tensor that is not itself a canonical form."""

    parts: tuple[WeightedEdit, ...]
    settings: Settings
    pending: int  # passes left to find the thresholds
    bins: Tensor | None = None  # (n, 2) int64: high bits of the lower and the upper threshold
    ranks: Tensor | None = None  # (n, 2) int64: rank of the threshold among the bin's elements, from the largest
    low: Tensor | None = None  # (n,) int64: bit patterns below this are dropped
    high: Tensor | None = None  # (n,) int64: bit patterns from this on are dropped

    @property
    def needs_pass(self) -> bool:
        """True until every threshold, and every sum of the parts' own edits, is known."""
        return self.pending > 0 or any(part.edit.needs_pass for part in self.parts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CombinedEdit:
        """Return the edit with its tensors on `device`, and the factors of its parts in `dtype`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        parts = tuple(replace(part, edit=part.edit.to(device, dtype)) for part in self.parts)
        return replace(
            self, parts=parts, bins=move(self.bins), ranks=move(self.ranks), low=move(self.low), high=move(self.high)
        )

    # -- passes ----------------------------------------------------------------------------------------

    def _edits_of_next_pass(self) -> list[int]:
        """Return the indices of the parts whose own pass comes next: all canonical forms, else one other edit."""
        waiting = [index for index, part in enumerate(self.parts) if part.edit.needs_pass]
        plain = [index for index in waiting if isinstance(self.parts[index].edit, CanonicalForm)]
        return plain or waiting[:1]

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        """Return what the next pass adds up over the rows of `block` (rows, columns), which begin at row `start`.

        Sums of the parts' own edits while these need passes, then (n, HIGH_BINS) or (2 n, LOW_BINS) histogram counts.
        """
        inner = self._edits_of_next_pass()
        if inner:
            edits = [self.parts[index].edit for index in inner]
            return torch.stack([edit.pass_sums(block.clone(), start) for edit in edits])
        counts = []
        for index, part in enumerate(self.parts):
            bits = size_bits(part.edit.delta_rows(block, start)).reshape(-1)
            if self.pending == 2:
                counts.append(torch.bincount(bits >> 15, minlength=HIGH_BINS))
                continue
            assert self.bins is not None
            for bound in range(2):
                inside = bits[(bits >> 15) == self.bins[index, bound]]
                counts.append(torch.bincount(inside & (LOW_BINS - 1), minlength=LOW_BINS))
        return torch.stack(counts)

    def with_pass_sums(self, sums: Tensor) -> CombinedEdit:
        """Return the edit after one pass; `sums` is the sum of `pass_sums` over all blocks of the tensor."""
        inner = self._edits_of_next_pass()
        if inner:
            parts = list(self.parts)
            for index, row in zip(inner, sums, strict=True):
                parts[index] = replace(parts[index], edit=parts[index].edit.with_pass_sums(row))
            return replace(self, parts=tuple(parts))
        if self.pending == 2:
            total = int(sums[0].sum())
            wanted_ranks = torch.tensor(
                [self._threshold_ranks(total, part) for part in self.parts], device=sums.device
            )  # (n, 2)
            bins, ranks = _find_bins(sums[:, None].expand(-1, 2, -1), wanted_ranks)
            return replace(self, pending=1, bins=bins, ranks=ranks)
        assert self.bins is not None and self.ranks is not None
        low_bits, _ = _find_bins(sums.view(len(self.parts), 2, LOW_BINS), self.ranks)
        thresholds = (self.bins << 15) + low_bits
        endless = torch.tensor(1 << 31, device=thresholds.device)
        low = torch.where(self.bins[:, 0] < 0, endless, thresholds[:, 0])
        high = torch.where(self.bins[:, 1] < 0, endless, thresholds[:, 1])
        return replace(self, pending=0, low=low, high=high)

    def _threshold_ranks(self, total: int, part: WeightedEdit) -> tuple[int, int]:
        """Return the ranks, from the largest, of the last element kept and of the last one dropped as too large."""
        drop_count = int(self.settings.gamma * total) if self.settings.method == "breadcrumbs" else 0
        keep_count = int(part.density * total)
        return (min(total, drop_count + keep_count) if keep_count else 0), drop_count

    # -- blocks ----------------------------------------------------------------------------------------

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        """Add the combined delta to `block` (rows, columns) in place; its rows begin at row `start`."""
        block.add_(self.delta_rows(block, start))
        return None

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        """Return the combined delta (rows, columns) of the rows `block` of W0, which begin at row `start`."""
        assert self.pending == 0, "make the passes before delta_rows"
        deltas = []
        for index, part in enumerate(self.parts):
            delta = part.edit.delta_rows(block, start)
            if self.low is not None and self.high is not None:
                bits = size_bits(delta)
                delta = delta * ((bits >= self.low[index]) & (bits < self.high[index]))
            if self.settings.random and not part.keeps_all:
                keep_mask = random_keep(part.key, part.density, start * delta.shape[1], delta.numel(), delta.device)
                delta = delta * keep_mask.view_as(delta) / part.density
            deltas.append(delta * part.weight)
        if not self.settings.elects:
            total = deltas[0]
            for delta in deltas[1:]:
                total += delta
            return total
        stack = torch.stack(deltas)
        weights = torch.tensor([abs(part.weight) for part in self.parts], dtype=stack.dtype, device=stack.device)
        agree = torch.sign(stack) == torch.sign(stack.sum(0))
        agree &= stack != 0
        agreeing = (weights[:, None, None] * agree).sum(0)
        return (stack * agree).sum(0) / agreeing.clamp_min(torch.finfo(stack.dtype).tiny) * weights.sum()


def size_bits(delta: Tensor) -> Tensor:
    """Return the bit patterns of |delta| in float32, as int64; their order is that of the magnitudes."""
    return delta.to(torch.float32).abs().contiguous().view(torch.int32).to(torch.int64)


def _find_bins(
    counts: Tensor,  # (n, 2, bins) int64
    ranks: Tensor,  # (n, 2) int64
) -> tuple[Tensor, Tensor]:
    """Return the bin of the rank-th largest element, and its rank within the bin; bin -1 for rank 0. Both (n, 2)."""
    above = counts.flip(-1).cumsum(-1)  # elements in this bin and higher ones, from the top
    place = (above < ranks[..., None]).sum(-1)  # (n, 2), bins from the top that do not reach the rank
    place = place.clamp_max(counts.shape[-1] - 1)
    before = torch.where(place > 0, above.gather(-1, (place - 1).clamp_min(0)[..., None])[..., 0], 0)
    bins = counts.shape[-1] - 1 - place
    return torch.where(ranks > 0, bins, -1), torch.where(ranks > 0, ranks - before, 0)


def key_of(seed: int, adapter: str, tensor: str) -> int:
    """Return the 64-bit key of the random numbers for a seed, an adapter and a tensor name."""
    digest = hashlib.sha256(f"{seed}\0{adapter}\0{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def random_keep(key: int, density: float, first: int, count: int, device: torch.device) -> Tensor:
    """Return (count,) bool, True with probability `density`: elements first .. first+count of the tensor of `key`."""
    return random_bits(key, first, count, device) < math.floor(density * (1 << BITS))


def combine_forms(forms: Sequence[CanonicalForm], weights: Sequence[float], weight: Tensor) -> CanonicalForm:
    """Return the linear combination of forms on W0 `weight` (out, in) as one canonical form, exactly, with row scales.

        W0 + sum w_i (diag(d_i) (W0 + U_i D_i) - W0) = diag(d) (W0 + sum diag(w_i d_i / d) U_i D_i)
        d = 1 + sum w_i (d_i - 1)

    so a combination of DoRAs is again low-rank factors and a row scale, of rank sum R_i. Residuals are folded, which is
    exact except for their rounding. Forms with column scales cannot be combined in this way.
    """
    bound = [form.bound_to(weight).folded() for form in forms]
    assert all(form.col_scale is None for form in bound), "the caller refuses column scales"
    if all(form.row_scale is None for form in bound):
        up = torch.cat([form.up * w for form, w in zip(bound, weights, strict=True)], dim=1)
        return CanonicalForm(up, torch.cat([form.down for form in bound]))
    ones = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    scales = [ones if form.row_scale is None else form.row_scale for form in bound]
    total = ones + sum((w * (scale - 1) for w, scale in zip(weights, scales, strict=True)), torch.zeros_like(ones))
    safe = torch.where(total == 0, ones, total)
    ups = [form.up * (w * scale / safe)[:, None] for form, w, scale in zip(bound, weights, scales, strict=True)]
    return CanonicalForm(torch.cat(ups, dim=1), torch.cat([form.down for form in bound]), row_scale=total)
