"""Figures of the change of one weight by a merge, as the manifest and the public result hold them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightChange:
    """The change of one weight by a merge, measured on a sample of its rows; norms are Frobenius norms in float32.

    W0 is the base's weight, W' the result before rounding, dW = W' - W0. `rounding` is the relative error that rounding
    to the output dtype adds. `lost` is the share of sum |dW| in elements whose stored value is still the base's.

    Example:
        >>> change = next(iter(merge("base", "adapter", "a-merge").weights.values()))
        >>> 0 < change.relative_delta < 1
        True
    """

    relative_delta: float  # ||W' - W0|| / ||W0||
    rounding: float  # ||round(W') - W'|| / ||W' - W0||
    changed: float  # fraction of elements whose stored value changed
    lost: float  # sum |dW| over unchanged elements / sum |dW|
    sampled: float  # fraction of the tensor's elements that were measured
    retention: float | None = None  # <Q(W') - W0, dW> / ||dW||^2 of a requantised weight, else None
    delta_norm: float | None = None  # ||dW|| of a requantised weight, else None
