"""All quantised weights of one checkpoint: the result of detection.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .packed_weight import PackedWeight


@dataclass(frozen=True)
class Packed:
    """The quantised weights of a checkpoint, and the stored tensors that an unquantised checkpoint does not have."""

    weights: Mapping[str, PackedWeight]  # dense name -> weight
    side: frozenset[str]  # names of stored tensors: parts with a name of their own, scales of activations
    notes: tuple[str, ...] = ()  # what differs between the stored weights and what is run: activations in FP8, ...
