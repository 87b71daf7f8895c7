"""Requantised weights: the stored parts of W' in the base's own scheme, computed when the first of them is read.

The scheme's file proposes ways to quantise W' (with the scales of W, or with new scales). Each is tried with the
nearest codes and, where these lose a part of the change, with stochastic rounding, which preserves its mean
(quantisation/rounding.py). With dW = W' - W:

    retention = <Q(W') - W, dW> / |dW|^2        1: the change is kept on average; 0: it is lost
    rounding  = |Q(W') - W'| / |dW|             the error against W'

The way with the smallest LOST_CHANGE_WEIGHT (1 - retention)^2 + rounding^2 is written: random errors harm less than
a lost change of the same norm. The demo's DuDe on SmolLM2 in INT4: nearest codes (rounding 0.99, retention 0.03) have a
KL divergence of 1.95 to the unquantised merge, nearly that of the base; stochastic rounding (3.04, 0.96) one of 0.10.

One weight is computed at a time, because it is in memory as a whole in float32; its parts are freed after they were
written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapter_merge.binding.bound import BoundAdapter, BoundModule
from adapter_merge.errors import NumericsError, Problem, UnsupportedError, raise_all
from adapter_merge.methods.block_edits import BlockEdit, Replaced
from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.quantisation.packed_weight import ACCEPTED_LOSS, PackedWeight, replaced_parts, requantisation_loss
from adapter_merge.quantisation.rounding import uniform_numbers
from adapter_merge.storage.computed_tensor import ComputedRef, ReadBytes
from adapter_merge.storage.safetensors_header import TensorRef

from .plan import MergePlan, ShardPlan, plan_merge
from .weight_change import WeightChange

MERGE_INSTEAD = "merge with --as bfloat16, or serve the base with the adapter beside it"
BLOCK_BYTES = 4 << 20  # of float32 in one step
_compute_lock = threading.Lock()


@dataclass(eq=False)
class RequantisedWeight:
    """A packed weight of the output: `weight` of the base, changed by `edits` or replaced by `replacement`."""

    weight: PackedWeight
    edits: tuple[BoundModule, ...] = ()
    replacement: TensorRef | None = None
    figures: WeightChange | None = None  # once it was computed
    _computed: dict[str, Tensor] = field(default_factory=dict)  # role -> bytes, uint8 (n,), of parts not written yet
    _unread: dict[str, int] = field(default_factory=dict)  # role -> number of bytes not read yet
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def parts(self) -> dict[str, RequantisedPart]:
        """Return each part by the name of its stored tensor."""
        return {
            ref.name: RequantisedPart(ref.name, ref.file, ref.dtype, ref.shape, 0, ref.nbytes, self.weight,
                                      tuple({part.file for part in self.weight.parts.values()}), owner=self, role=role)
            for role, ref in self.weight.parts.items()
        }  # fmt: skip

    def read_part(
        self,
        role: str,
        read: ReadBytes,
        first: int,
        buffer: Tensor,  # (n,) uint8
    ) -> None:
        """Fill `buffer` from byte `first` of a part; a part is freed once all of its bytes were read."""
        with self._lock:
            if role not in self._unread:
                with _compute_lock:
                    self._computed = self._compute(read)
                self._unread = {name: ref.nbytes for name, ref in self.weight.parts.items()}
            computed = self._computed.get(role)
            self._unread[role] -= buffer.numel()
            if self._unread[role] == 0:
                self._computed.pop(role, None)
                del self._unread[role]
        stored = self.weight.parts[role]
        buffer.copy_(
            read(stored, first, first + buffer.numel()) if computed is None else computed[first : first + len(buffer)]
        )

    def _compute(self, read: ReadBytes) -> dict[str, Tensor]:
        """Return the bytes of the parts that change, and set `figures`. Raises NumericsError for NaN or infinity."""
        after = self._compute_result(read)
        if not bool(torch.isfinite(after).all()):
            raise NumericsError(f"{self.weight.name}: would hold NaN or infinity")
        best: Mapping[str, Tensor] = {}
        best_figures: WeightChange | None = None
        for uniform in (None, uniform_numbers(self.weight.name, self.weight.shape)):
            for parts in self.weight.candidates(after.reshape(self.weight.shape), read, uniform):
                figures = self._measure(after, read, parts)
                if best_figures is None or _compute_loss(figures) < _compute_loss(best_figures):
                    best, best_figures = parts, figures
            if best_figures is not None and abs(1 - (best_figures.retention or 0.0)) < ACCEPTED_LOSS:
                break
        self.figures = best_figures
        return {role: tensor.contiguous().view(-1).view(torch.uint8) for role, tensor in best.items()}

    def _compute_result(self, read: ReadBytes) -> Tensor:
        """Return W' (rows, columns), float32."""
        edits: list[BlockEdit] = [module.stored_edit(torch.float32) for module in self.edits]
        if self.replacement is not None:
            edits = [Replaced(self.replacement)]
        for index, edit in enumerate(edits):
            while edit.needs_pass:
                sums = [edit.pass_sums(block.clone(), start) for start, block in self._blocks(read)]
                edit = edit.with_pass_sums(torch.stack(sums).sum(0))
            edits[index] = edit
        after = torch.empty(self.weight.row_count, self.weight.shape[-1], dtype=torch.float32)
        for start, block in self._blocks(read):
            for edit in edits:
                edit.apply_(block, start)
            after[start : start + block.shape[0]] = block
        return after

    def _blocks(self, read: ReadBytes, parts: Mapping[str, Tensor] | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, rows) of the dequantised weight in float32; `parts` replace the stored ones."""
        weight, columns = self.weight, self.weight.shape[-1]
        if parts is not None:
            weight, read = weight.uncached(), replaced_parts(weight.parts, parts, read)
        step = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, weight.row_count, step):
            rows = weight.rows(read, start, min(step, weight.row_count - start))
            yield start, rows.to(torch.float32, copy=True)

    def _measure(
        self,
        after: Tensor,  # (rows, columns) float32
        read: ReadBytes,
        parts: Mapping[str, Tensor],
    ) -> WeightChange:
        """Return the figures of the weight that `parts` dequantise to, over all elements, summed in float64."""
        base = delta = error = inner = absolute = unchanged = 0.0
        changed = 0
        for (start, before), (_, stored) in zip(self._blocks(read), self._blocks(read, parts), strict=True):
            result = after[start : start + before.shape[0]]
            change, moved = (result - before).double(), (stored - before).double()
            is_unchanged = moved == 0
            base += float(before.double().square().sum())
            delta += float(change.square().sum())
            error += float((moved - change).square().sum())
            inner += float((moved * change).sum())
            absolute += float(change.abs().sum())
            unchanged += float((change.abs() * is_unchanged).sum())
            changed += is_unchanged.numel() - int(is_unchanged.sum())
        if not math.isfinite(error):
            raise NumericsError(f"{self.weight.name}: would hold NaN or infinity after it is quantised again")
        return WeightChange(
            relative_delta=math.sqrt(delta / base) if base else 0.0,
            rounding=math.sqrt(error / delta) if delta else 0.0,
            changed=changed / max(1, after.numel()),
            lost=unchanged / absolute if absolute else 0.0,
            sampled=1.0,
            retention=inner / delta if delta else 1.0,
            delta_norm=math.sqrt(delta),
        )


@dataclass(frozen=True)
class RequantisedPart(ComputedRef):
    """One stored tensor of a requantised weight. Its bytes may be read once, in pieces of any order."""

    owner: RequantisedWeight = field(compare=False, repr=False, kw_only=True)
    role: str = field(kw_only=True)

    def read_into(
        self,
        read: ReadBytes,
        first: int,
        buffer: Tensor,  # (n,) uint8
    ) -> None:
        if buffer.numel():
            self.owner.read_part(self.role, read, self.start + first, buffer)


def _compute_loss(figures: WeightChange) -> float:
    """Return the loss of one way to quantise, by which the ways are compared."""
    return requantisation_loss(figures.retention or 0.0, figures.rounding)


def plan_requantised(bound: BoundAdapter) -> MergePlan:
    """Plan the merge into a quantised base in its own scheme: adapted weights are quantised again, all others copied.

    Raises UnsupportedError with every adapted weight whose scheme cannot be quantised again, and every tensor that the
    output would hold under a second name.
    """
    stored = bound.base.stored
    assert stored is not None
    edits: dict[str, list[BoundModule]] = {}
    for module in bound.modules:
        edits.setdefault(module.weight.name, []).append(module)
    weights, problems = [], []
    for name, weight in packed_weights(bound.base).items():
        replacement = bound.replacements.get(name)
        if name not in edits and replacement is None:
            continue
        if not weight.can_pack:
            problems.append(
                Problem(f"{name}: weights of {weight.scheme} can be read, but not written", hint=MERGE_INSTEAD)
            )
        if any(module.name != name for module in edits.get(name, ())):
            problems.append(
                Problem(f"{name}: the output would hold this quantised weight under two names", hint=MERGE_INSTEAD)
            )
        weights.append(RequantisedWeight(weight, tuple(edits.get(name, ())), replacement))
    problems += [
        Problem(f"{name}: would be a copy of a quantised weight", hint=MERGE_INSTEAD)
        for name, ref in bound.copies.items()
        if isinstance(ref, ComputedRef)
    ]
    raise_all(problems, UnsupportedError)
    requantised = {item.weight.name for item in weights}
    unpacked = replace(
        bound,
        base=stored,
        modules=tuple(module for module in bound.modules if module.weight.name not in requantised),
        replacements={name: ref for name, ref in bound.replacements.items() if name not in requantised},
    )
    parts = {name: part for item in weights for name, part in item.parts().items()}
    return plan_merge(stored, (unpacked,), parts=parts)


def collect_figures(plan: ShardPlan) -> dict[str, WeightChange]:
    """Return the figures of the requantised weights whose first part is in this output file."""
    figures = {}
    for job in plan.jobs:
        part = job.source
        if isinstance(part, RequantisedPart) and part.role == next(iter(part.owner.weight.parts)):
            assert part.owner.figures is not None
            figures[part.owner.weight.name] = part.owner.figures
    return figures
