"""Fingerprints of the base weights that an adapter adapts: adapters that adapter-merge writes record them.

They distinguish the base of the training from another base of the same shapes. Only the adapted weights count, so that
a new head, resized embeddings or a prefix of the names make no difference. A fingerprint is "DTYPE SHAPE SHA256" over
the first and last 4 KiB of a weight (16 hex digits), as it is stored. It takes milliseconds; every command compares it.

Folders that were written with access to their base also record the sha256 of whole weights (`hash_whole_weights`).
Commands that read all weights anyway compare these (`check_whole_base`), which also detects an edit in the middle of a
weight.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adapter_merge.binding.bound import BoundAdapter, BoundModule
from adapter_merge.binding.convolutions import stored_weight
from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.files.input_errors import reading
from adapter_merge.storage.checkpoint import sample_bytes
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_but_for_rounding

from .adapter_hashes import MANIFEST, read_manifest_of

PIECE = 1 << 20  # bytes of a weight that are hashed at a time


@dataclass(frozen=True)
class Comparison:
    """The result of comparing recorded fingerprints with a base: the number of equal weights, the names of others."""

    equal: int
    different: tuple[str, ...]


def weight_fingerprint(ref: TensorRef, rows: tuple[int, int] | None = None) -> str:
    """Return the fingerprint of a stored weight, or of its rows [first, stop)."""
    first, stop = rows or (0, ref.rows)
    shape = "x".join(str(size) for size in (stop - first, *ref.shape[1:]))
    digest = hashlib.sha256(sample_bytes(ref, first * ref.row_bytes, stop * ref.row_bytes))
    return f"{ref.dtype} {shape} {digest.hexdigest()[:16]}"


def fingerprint_weights(bound: BoundAdapter) -> dict[str, str]:
    """Return the fingerprints of all adapted weights, by the names that modules and parameters had at training.

    Not included: weights that no file of the base holds (dequantised ones, and those that the adapter replaces), and
    modules that the base stores as several tensors.
    """
    return {name: weight_fingerprint(item.weight, item.rows) for name, item in _items_by_name(bound).items()}


def hash_whole_weights(bound: BoundAdapter) -> dict[str, str]:
    """Return the sha256 of the same weights over all their bytes, by the same names. Hashes weights in parallel."""
    named = _items_by_name(bound)
    return dict(zip(named, _hash_all(list(named.values())), strict=True))


def _items_by_name(bound: BoundAdapter) -> dict[str, BoundModule]:
    """Return the modules that `fingerprint_weights` covers, by the name of module and parameter."""
    named = [(f"{item.module.name}.{item.module.parameter}", item) for item in bound.modules]
    counts = Counter(name for name, _ in named)
    return {
        name: item
        for name, item in named
        if counts[name] == 1
        and bound.base.tensors.get(item.weight.name) == stored_weight(item, bound.base)
        and not isinstance(item.weight, ComputedRef)
    }


def _hash_all(items: Sequence[BoundModule]) -> list[str]:
    """Return the sha256 of each item's weight, in order; one thread per core."""
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(_hash_whole_weight, items))


def _hash_whole_weight(item: BoundModule) -> str:
    """Return the sha256 of the weight's bytes, or of its adapted rows."""
    ref = item.weight
    first, stop = item.rows or (0, ref.rows)
    digest, remaining = hashlib.sha256(), (stop - first) * ref.row_bytes
    with reading(ref.file), ref.file.open("rb", buffering=0) as stream:
        stream.seek(ref.start + first * ref.row_bytes)
        while remaining:
            piece = stream.read(min(PIECE, remaining))
            if not piece:
                break
            digest.update(piece)
            remaining -= len(piece)
    return digest.hexdigest()


def check_whole_base(bound: BoundAdapter) -> None:
    """Compare whole weights of the base with the hashes, or the frozen weights, that the adapter's files hold.

    Raises MismatchError where they differ and the adapter is not forced.
    """
    if bound.adapter.forced:
        return
    problems = find_changed_weights(bound, bound.adapter.folder) + _compare_with_own_base(bound)
    raise_all(problems, MismatchError)


def find_changed_weights(bound: BoundAdapter, folder: Path) -> list[Problem]:
    """Return the problem where the manifest of `folder` records other values of the base's adapted weights."""
    stated = read_manifest_of(folder).get("base")
    recorded = stated.get("whole_weights") if isinstance(stated, dict) else None
    if not isinstance(recorded, dict):
        return []
    ends = stated.get("weights") if isinstance(stated, dict) else None
    ends = ends if isinstance(ends, dict) else {}
    named = {
        name: item
        for name, item in _items_by_name(bound).items()
        if isinstance(recorded.get(name), str)
        and _dtype_and_shape(ends.get(name)) == _dtype_and_shape(weight_fingerprint(item.weight, item.rows))
    }
    different = [
        name for name, sha in zip(named, _hash_all(list(named.values())), strict=True) if sha != recorded[name]
    ]
    if not different:
        return []
    return [
        Problem(
            f"{folder / MANIFEST}: names another base: the same tensors with other values",
            got=f"{len(different)} of {len(named)} adapted weights differ in some of their bytes, first {different[0]}",
            hint="give the base that it names; --force accepts this base",
        )
    ]


def _dtype_and_shape(fingerprint: object) -> list[str] | None:
    """Return dtype and shape of a fingerprint: bytes are compared only where both are equal."""
    return fingerprint.split()[:2] if isinstance(fingerprint, str) else None


def _compare_with_own_base(bound: BoundAdapter) -> list[Problem]:
    """Return the problem where a checkpoint that holds its base holds other values than the given base."""
    own_base = bound.adapter.own_base
    if own_base is None or bound.base.stored is not None or own_base.folder.resolve() == bound.base.folder.resolve():
        return []
    different = [
        item.weight.name
        for item in bound.modules
        if item.module.parameter == "weight"
        and not item.transposed
        and (trained_weight := own_base.tensors.get(f"{item.module.name}.weight")) is not None
        and trained_weight.shape == item.weight.shape
        and not same_but_for_rounding(trained_weight, item.weight)
    ]
    if not different:
        return []
    return [
        Problem(
            "the checkpoint was trained on another base: its frozen weights are not this base's",
            got=f"{len(different)} weights differ, first {different[0]}",
            hint="leave BASE out, since the checkpoint holds its base; --force accepts this base",
        )
    ]


def compare_weights(recorded: Mapping[str, object], bound: BoundAdapter) -> Comparison:
    """Compare recorded fingerprints with the base of `bound`; those of another dtype or shape are not counted."""
    equal, different = 0, []
    for name, fingerprint in fingerprint_weights(bound).items():
        stated = recorded.get(name)
        if stated == fingerprint:
            equal += 1
        elif isinstance(stated, str) and stated.split()[:2] == fingerprint.split()[:2]:
            different.append(name)
    return Comparison(equal, tuple(different))
