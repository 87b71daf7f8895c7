"""All quantised weights of one checkpoint: the result of detection.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .packed_weight import PackedWeight


@dataclass(frozen=True)
class QuantisedWeights:
    """The quantised weights of a checkpoint, and the stored tensors that its dense view does not have."""

    weights: Mapping[str, PackedWeight]  # dense name -> weight
    side: frozenset[str]  # names of stored tensors: parts of weights, scales of activations
    notes: tuple[str, ...] = ()  # differences at run time, such as quantised activations
