"""Structured randomised SVD: the leading part of dW from products with it (Halko, Martinsson, Tropp 2011, alg. 4.4).

Subspace iteration with orthonormalisation at every step. The energy captured at the requested rank grows with every
iteration; the iteration stops when it grows by less than a small share of the remaining squared error. The random
numbers are seeded by the weight's name, so that the result does not depend on the order in which weights are processed.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
from torch import Tensor

from .truncated_svd import Spectrum

GAIN = 2e-3  # share of the remaining squared error; an iteration that gains less is the last
MAX_ITERATIONS = 16
NORM_GAIN = 1e-3  # relative growth of the norm; a power iteration that gains less is the last


class LinearMap(Protocol):
    """Matrix (out, in) that is available through products with it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def matmul(self, x: Tensor) -> Tensor:
        """Compute matrix @ x: x (in, l) -> (out, l)."""

    def rmatmul(self, y: Tensor) -> Tensor:
        """Compute matrix^T @ y: y (out, l) -> (in, l)."""


def generator(name: str, device: torch.device) -> torch.Generator:
    """Return a random generator whose seed depends on `name` only."""
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def oversampled(rank: int, limit: int) -> int:
    """Return the number of columns to iterate with for a rank: 1.5 times it, at least 10 more, at most `limit`."""
    return min(rank + max(10, rank // 2), limit)


def randomised_spectrum(
    delta: LinearMap,
    total: float,  # ||dW S||_F^2
    rank: int,
    random: torch.Generator,
    root: Tensor | None = None,  # (in, n) float32: S
) -> Spectrum:
    """Return the leading `rank` directions of dW (of dW S with a root), and the oversampled ones after them.

    The squared error of the first `rank` directions is within a few tenths of a percent of the smallest possible.
    """
    out, inner = delta.shape
    start = inner if root is None else root.shape[1]
    limit = min(out, inner, start)
    width = oversampled(rank, limit)
    x = torch.randn(start, width, generator=random, device=random.device)
    captured = 0.0
    for _ in range(MAX_ITERATIONS):
        q, _ = torch.linalg.qr(delta.matmul(x if root is None else root @ x))  # (out, l)
        right = delta.rmatmul(q)  # (in, l) = dW^T q
        z = right if root is None else root.T @ right  # (dW S)^T q
        wide = z.to(torch.float64)
        values, vectors = torch.linalg.eigh(wide.T @ wide)
        now = float(values[-rank:].sum())
        if now - captured <= GAIN * max(total - now, 0.0) or now <= 0:
            break
        captured = now
        x, _ = torch.linalg.qr(z)
    rotation = vectors.flip(1)  # (l, l), by descending eigenvalue
    squares = values.flip(0).clamp_min(0)
    left, rows = q.to(torch.float64) @ rotation, rotation.T @ right.T.to(torch.float64)
    # The captured energy can exceed `total` by rounding: their sums are computed in different orders.
    return Spectrum(left, rows, squares, max(total, float(squares.sum())), full=width == limit)


def spectral_norm(delta: LinearMap, random: torch.Generator, columns: int = 8) -> float:
    """Return ||dW||_2 by block power iteration: about 0.1 % too small at most, never too large."""
    x = torch.randn(delta.shape[1], min(columns, *delta.shape), generator=random, device=random.device)
    norm = 0.0
    for _ in range(2 * MAX_ITERATIONS):
        x, _ = torch.linalg.qr(x)
        y = delta.matmul(x)
        now = float(torch.linalg.matrix_norm(y, 2))
        if now <= norm * (1 + NORM_GAIN):
            return max(now, norm)
        norm = now
        x = delta.rmatmul(y / now)
    return norm
