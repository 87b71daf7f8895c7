"""Fingerprints of the base weights that an adapter adapts: adapters that adapter-merge writes record them.

They tell the base of the training from another one of the same shapes, also where other tensors differ: heads, resized
embeddings, the names of a prefix. A fingerprint is "DTYPE SHAPE SHA256" over the first and last 4 KiB of a weight (16
hex digits), as it is stored.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from adapter_merge.binding.bound import BoundAdapter
from adapter_merge.storage.checkpoint import sample_bytes
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.safetensors_header import TensorRef


@dataclass(frozen=True)
class Comparison:
    """Recorded weights against those of a base: how many are equal, and the names of those that are not."""

    equal: int
    different: tuple[str, ...]


def weight_fingerprint(ref: TensorRef, rows: tuple[int, int] | None = None) -> str:
    """Return the fingerprint of a stored weight, or of its rows [first, stop)."""
    first, stop = rows or (0, ref.rows)
    shape = "x".join(str(size) for size in (stop - first, *ref.shape[1:]))
    digest = hashlib.sha256(sample_bytes(ref, first * ref.row_bytes, stop * ref.row_bytes))
    return f"{ref.dtype} {shape} {digest.hexdigest()[:16]}"


def base_weights(bound: BoundAdapter) -> dict[str, str]:
    """Return the fingerprints of all adapted weights by the names of modules and parameters at the training.

    Left out: weights that no file holds (of a quantised base) or the adapter brings along, and modules that the base
    stores as several tensors.
    """
    named = [(f"{item.module.name}.{item.module.parameter}", item) for item in bound.modules]
    counts = Counter(name for name, _ in named)
    return {
        name: weight_fingerprint(item.weight, item.rows)
        for name, item in named
        if counts[name] == 1
        and bound.base.tensors.get(item.weight.name) == item.weight
        and not isinstance(item.weight, ComputedRef)
    }


def compare_weights(recorded: Mapping[str, object], bound: BoundAdapter) -> Comparison:
    """Compare recorded fingerprints with the base of `bound`; those of another dtype or shape are passed over."""
    equal, different = 0, []
    for name, found in base_weights(bound).items():
        stated = recorded.get(name)
        if stated == found:
            equal += 1
        elif isinstance(stated, str) and stated.split()[:2] == found.split()[:2]:
            different.append(name)
    return Comparison(equal, tuple(different))
