"""Errors of the factors of one weight: the float32 factors as written, compared with the delta in float64.

    relative_error   ||dW - F||_F / ||dW||_F          spectral_error   ||dW - F||_2 / ||dW||_2
    energy           1 - relative_error^2             output_error     ||(dW - F) S||_F / ||dW S||_F, S S^T = E x x^T

F is what a server adds to W0: up down, or diag(s - 1) W0 + diag(s) up down with a row scale s. To measure the errors,
W0 is read again, in blocks; where no base is needed, they are computed from the QR cores of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapter_merge.errors import ParityError, Problem, raise_all

from .delta_operator import AnyDelta
from .randomised_svd import generator, spectral_norm
from .truncated_svd import product_norms

SPECTRUM_LENGTH = 64  # number of singular values in the manifest, per weight


@dataclass(frozen=True)
class LayerFigures:
    """Figures of one weight, as its entry in the manifest."""

    shape: tuple[int, int]
    rank: int
    route: str  # "exact", "cores", "randomised", "dense"
    relative_error: float
    spectral_error: float
    energy: float
    relative_delta: float | None = None  # ||dW||_F / ||W0||_F; None where the base was not read
    output_error: float | None = None  # None without calibration
    singular_values: tuple[float, ...] = ()  # the first ones of dW (of dW S), relative to its Frobenius norm

    def as_json(self) -> dict[str, Any]:
        """Return the manifest's entry, with rounded numbers."""
        content: dict[str, Any] = {"shape": list(self.shape), "rank": self.rank, "route": self.route}
        for name in ("relative_error", "spectral_error", "energy", "relative_delta", "output_error"):
            value = getattr(self, name)
            content[name] = None if value is None else float(f"{value:.8g}")
        content["singular_values"] = [float(f"{value:.4g}") for value in self.singular_values]
        return content


def relative(part: float, whole: float) -> float:
    """Return part / whole; 0 where both are 0, infinity where only `whole` is."""
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


def low_rank_errors(
    exact_up: Tensor,  # (out, R) float64
    exact_down: Tensor,  # (R, in) float64
    up: Tensor,  # (out, k) float32, as written
    down: Tensor,  # (k, in) float32
    root: Tensor | None = None,  # (in, n) float64
) -> tuple[float, float, float | None]:
    """Return relative_error, spectral_error and output_error of factors without a row scale, without the base."""
    left = torch.cat((exact_up, -up.to(exact_up)), dim=1)
    right = torch.cat((exact_down, down.to(exact_down)), dim=0)
    if left.shape[1] > min(
        left.shape[0], right.shape[1]
    ):  # the product has full rank: computing it is cheaper than its QR cores
        return _dense_errors(left @ right, exact_up @ exact_down, root)
    error_norm, error_top = product_norms(left, right)
    delta_norm, delta_top = product_norms(exact_up, exact_down)
    output = None
    if root is not None:
        output = relative(product_norms(left, right @ root)[0], product_norms(exact_up, exact_down @ root)[0])
    return relative(error_norm, delta_norm), relative(error_top, delta_top), output


def _dense_errors(error: Tensor, delta: Tensor, root: Tensor | None) -> tuple[float, float, float | None]:
    """Return the three errors of `low_rank_errors` from the error matrix and the delta, both (out, in) float64."""
    frobenius, whole = float(torch.linalg.vector_norm(error)), float(torch.linalg.vector_norm(delta))
    if not whole > 0:
        return relative(frobenius, whole), relative(frobenius, whole), None if root is None else 0.0
    unit = frobenius or 1.0
    tops = []
    for matrix in (error / unit, delta / whole):
        tops.append(spectral_norm(_MatrixMap(matrix.to(torch.float32)), generator("dense", matrix.device)))
    output = None
    if root is not None:
        output = relative(float(torch.linalg.vector_norm(error @ root)), float(torch.linalg.vector_norm(delta @ root)))
    return relative(frobenius, whole), relative(tops[0] * unit, tops[1] * whole), output


class _MatrixMap:
    """Matrix in memory as a `LinearMap` (randomised_svd.py)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def rmatmul(self, y: Tensor) -> Tensor:
        return self.matrix.T @ y


@dataclass(frozen=True)
class MeasuredErrors:
    """Errors of one weight's factors, measured in a pass over its base weight."""

    relative_error: float
    spectral_error: float
    relative_delta: float
    output_error: float | None


class _ErrorMap:
    """dW - F as a `LinearMap`: in memory in float32 for a small weight, computed block by block for a large one."""

    def __init__(self, delta: AnyDelta, up: Tensor, down: Tensor, scale: Tensor | None) -> None:
        self.delta = delta
        self.shape = delta.shape
        self.up, self.down = up.to(torch.float64), down.to(torch.float64)
        self.scale = None if scale is None else scale.to(torch.float64)
        self.dense: Tensor | None = None  # (out, in) float32 of a small weight

    def block(self, start: int, base: Tensor, delta: Tensor) -> Tensor:
        """Return rows start .. start+n of dW - F (n, in), from the same rows of W0 and dW."""
        rows = slice(start, start + base.shape[0])
        product = self.up[rows] @ self.down
        if self.scale is None:
            return delta - product
        scale = self.scale[rows, None]
        return delta.addcmul(base, scale - 1, value=-1).sub_(product.mul_(scale))

    def matmul(self, x: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense @ x
        return torch.cat([self.block(*parts).to(x.dtype) @ x for parts in self.delta.delta_blocks()])

    def rmatmul(self, y: Tensor) -> Tensor:
        if self.dense is not None:
            return self.dense.T @ y
        product = torch.zeros(self.shape[1], y.shape[1], dtype=y.dtype, device=y.device)
        for start, base, delta in self.delta.delta_blocks():
            product += self.block(start, base, delta).to(y.dtype).T @ y[start : start + base.shape[0]]
        return product


def measure(
    name: str,
    delta: AnyDelta,
    up: Tensor,  # (out, R) float32, as written
    down: Tensor,  # (R, in) float32
    scale: Tensor | None,  # (out,) float32
    top: float | None = None,  # ||dW||_2 where it is known
    root: Tensor | None = None,  # (in, n) float32
) -> MeasuredErrors:
    """Measure the errors of these factors: one float64 pass over the base, power iterations for spectral norms."""
    device = delta.rows.device
    errors = _ErrorMap(delta, up.to(device), down.to(device), None if scale is None else scale.to(device))
    squared_error = total = weighted_error = weighted_total = 0.0
    blocks = []
    for start, base, rows in delta.delta_blocks():
        difference = errors.block(start, base, rows)
        squared_error += float(difference.square().sum())
        total += float(rows.square().sum())
        single = difference.to(torch.float32)
        if root is not None:
            weighted_error += float((single @ root).square().sum())
            weighted_total += float((rows.to(torch.float32) @ root).square().sum())
        if delta.rows.resident:
            blocks.append(single)
    errors.dense = torch.cat(blocks) if blocks else None
    if total > 0:
        # Scale the errors so that their float32 squares do not underflow: those of exact factors are 1e-8 of the delta.
        unit = math.sqrt(squared_error) or 1.0
        if errors.dense is not None:
            errors.dense /= unit
        spectral = spectral_norm(errors, generator(name, device)) * (unit if errors.dense is not None else 1.0)
        top = spectral_norm(delta, generator(name, device)) if top is None else top
    else:
        spectral = top = 0.0
    return MeasuredErrors(
        relative(math.sqrt(squared_error), math.sqrt(total)),
        relative(spectral, top),
        relative(math.sqrt(total), math.sqrt(delta.base_total)),
        relative(math.sqrt(weighted_error), math.sqrt(weighted_total)) if root is not None else None,
    )


def summary(layers: Mapping[str, LayerFigures]) -> dict[str, Any]:
    """Return the certificate over all weights: largest and mean errors, by the manifest's keys."""
    worst = max(layers, key=lambda name: layers[name].relative_error)
    weighted = [figures.output_error for figures in layers.values() if figures.output_error is not None]
    content: dict[str, Any] = {
        "weights": len(layers),
        "ranks": [min(f.rank for f in layers.values()), max(f.rank for f in layers.values())],
        "max_relative_error": layers[worst].relative_error,
        "worst_weight": worst,
        "mean_relative_error": sum(f.relative_error for f in layers.values()) / len(layers),
        "max_spectral_error": max(f.spectral_error for f in layers.values()),
        "mean_energy": sum(f.energy for f in layers.values()) / len(layers),
        "mean_output_error": sum(weighted) / len(weighted) if weighted else None,
    }
    return {key: float(f"{value:.8g}") if isinstance(value, float) else value for key, value in content.items()}


def check_errors(layers: Mapping[str, LayerFigures], limit: float) -> None:
    """Raise ParityError where weights have a relative error above `limit`; it names the ten worst and counts all."""
    above = sorted(
        (name for name in layers if layers[name].relative_error > limit),
        key=lambda name: -layers[name].relative_error,
    )
    problems = [
        Problem(
            f"{name}: the error of the factors is above --max-error",
            f"relative error <= {limit:g}",
            f"{layers[name].relative_error:.4g}",
        )
        for name in above[:10]
    ]
    if above:
        problems.append(
            Problem(
                f"{len(above)} of {len(layers)} weights have an error above --max-error",
                hint="use a higher --rank or --budget, --scale exact, or no --rank for exact factors",
            )
        )
    raise_all(problems, ParityError)
