"""What a merge did to one weight: the figures of the manifest and of the public result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightChange:
    """What a merge did to one weight, measured on a sample of its rows; norms are Frobenius norms in float32.

    rounding is the size of the error that rounding to the output dtype added. lost is the part of the change that this
    rounding removed: the share of sum |dW| in elements whose stored value is still the base's.
    """

    relative_delta: float  # ||W' - W0|| / ||W0||
    rounding: float  # ||round(W') - W'|| / ||W' - W0||
    changed: float  # fraction of elements whose stored value changed
    lost: float  # sum |dW| over unchanged elements / sum |dW|
    sampled: float  # fraction of the tensor's elements that were measured
    retention: float | None = None  # <Q(W') - W0, dW> / ||dW||^2 of a weight that was quantised again
    delta_norm: float | None = None  # ||dW|| of a weight that was quantised again
