"""Comparison of the parameters of a traced export with those of the trained model: errors and problems."""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_merge.verification.compare_weights import WEIGHT_TOLERANCE, Progress, WeightFigures

from .int8_matrix import Int8Matrix

SMALLEST_FLOAT16 = 6e-8  # the smallest magnitude that onnxruntime's float16 converter writes for a value that is not 0
# A, B and the row scale of an adapter are rounded to float16 once each; their product may be off by as many ulp.
FLOAT16_ROUNDINGS = 4


class ParameterErrors:
    """Collects the relative error of dW of every adapted parameter, and all problems."""

    def __init__(self, progress: Progress | None) -> None:
        self.layers: dict[str, WeightFigures] = {}
        self.problems: list[str] = []
        self.compared = 0
        self._progress = progress

    def compare(
        self,
        name: str,
        got: Tensor | Int8Matrix,
        before: Tensor | None,
        after: Tensor,
        computed_in: str | None = None,
    ) -> None:
        """Compare a parameter of the export with the trained one.

        got: what the export stores, in its dtype, or what it computes, in float64. before: the base's parameter in
        float64; None where the base has none. after: the trained parameter in float64. computed_in: the dtype's name of
        the factors that `got` was computed from; None where `got` is stored.

        A stored parameter that training did not change must be equal after one rounding to its dtype. Everything else
        is measured by the relative error of dW = after - before, see `check_tolerance`.
        """
        self.compared += 1
        if self._progress is not None:
            self._progress(after.nbytes)
        if tuple(got.shape) != tuple(after.shape):
            self.problems.append(f"{name} has the shape {tuple(got.shape)} instead of {tuple(after.shape)}")
            return
        errors, dtype = _errors_beyond_rounding(got, after, computed_in)
        was_trained = before is not None and (before.shape != after.shape or not torch.equal(before, after))
        if computed_in is None and not was_trained:
            if bool(errors.any()):
                self.problems.append(f"{name} was changed")
            return
        size = 0.0
        if before is not None and before.shape == after.shape:
            size = float(torch.linalg.vector_norm(after - before))
        size = size or float(torch.linalg.vector_norm(after))
        error = float(torch.linalg.vector_norm(errors)) / (size or 1.0)
        earlier = self.layers.get(name)
        worst = max(error if error == error else float("inf"), earlier.relative_error if earlier is not None else 0.0)
        self.layers[name] = WeightFigures(worst, 0.0, dtype)

    def check_tolerance(self) -> None:
        """Add a problem where the relative error of dW of a parameter is above the tolerance of its dtype."""
        bad = [name for name, layer in self.layers.items() if not layer.relative_error <= _tolerance(layer.dtype)]
        if bad:
            self.problems.append(f"{len(bad)} weights with a relative error of dW above the tolerance, first {bad[0]}")


def _errors_beyond_rounding(got: Tensor | Int8Matrix, after: Tensor, computed_in: str | None) -> tuple[Tensor, str]:
    """Return by how much each value is off beyond one rounding to its dtype, and the dtype's name."""
    exact = after.double()
    if isinstance(got, Int8Matrix):
        return got.excess(exact), "int8"
    errors = (got.double() - exact).abs()
    if computed_in is not None and got.dtype == torch.float64:
        return errors, computed_in
    if got.dtype.is_floating_point:
        errors -= torch.finfo(got.dtype).eps / 2 * exact.abs()
        if got.dtype == torch.float16:
            errors -= SMALLEST_FLOAT16
    return errors.clamp_min(0), str(got.dtype).removeprefix("torch.")


def _tolerance(dtype: str) -> float:
    return FLOAT16_ROUNDINGS * torch.finfo(torch.float16).eps if dtype == "float16" else WEIGHT_TOLERANCE
