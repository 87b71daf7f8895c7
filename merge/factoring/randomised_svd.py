"""Structured randomised SVD: the leading part of dW from products with it (Halko, Martinsson, Tropp 2011, alg. 4.4).

Subspace iteration with orthonormalisation at every step. It stops by what it has measured: the energy caught at the
wanted rank grows from one iteration to the next, and no more than a small part of what is left is worth another one.
Seeded by the weight's name: the same input gives the same bits, in whatever order the weights are taken.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
from torch import Tensor

from .truncated_svd import Spectrum

GAIN = 2e-3  # of the squared error that is left: less is not worth two more passes
MAX_ITERATIONS = 16
NORM_GAIN = 1e-3


class LinearMap(Protocol):
    """A matrix (out, in) known by its products."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def matmul(self, x: Tensor) -> Tensor:
        """(in, l) -> (out, l)."""

    def rmatmul(self, y: Tensor) -> Tensor:
        """(out, l) -> (in, l)."""


def generator(name: str, device: torch.device) -> torch.Generator:
    """Random numbers that depend on `name` alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def oversampled(rank: int, limit: int) -> int:
    """How many columns to iterate for a wanted rank: half as many again, at least ten more."""
    return min(rank + max(10, rank // 2), limit)


def randomised_spectrum(
    delta: LinearMap,
    total: float,  # ||dW S||_F^2
    rank: int,
    random: torch.Generator,
    root: Tensor | None = None,  # (in, n) float32: S
) -> Spectrum:
    """The leading `rank` directions of dW (of dW S), and the oversampled ones behind them.

    The squared error of the first `rank` is within a few tenths of a percent of the best there is.
    """
    out, inner = delta.shape
    start = inner if root is None else root.shape[1]
    limit = min(out, inner, start)
    width = oversampled(rank, limit)
    x = torch.randn(start, width, generator=random, device=random.device)
    caught = 0.0
    for _ in range(MAX_ITERATIONS):
        q, _ = torch.linalg.qr(delta.matmul(x if root is None else root @ x))  # (out, l)
        right = delta.rmatmul(q)  # (in, l) = dW^T q
        z = right if root is None else root.T @ right  # (dW S)^T q
        wide = z.to(torch.float64)
        values, vectors = torch.linalg.eigh(wide.T @ wide)
        now = float(values[-rank:].sum())
        if now - caught <= GAIN * max(total - now, 0.0) or now <= 0:
            break
        caught = now
        x, _ = torch.linalg.qr(z)
    turn = vectors.flip(1)  # (l, l), falling
    squares = values.flip(0).clamp_min(0)
    left, rows = q.to(torch.float64) @ turn, turn.T @ right.T.to(torch.float64)
    # What was caught can exceed a total found in another order of sums by rounding only.
    return Spectrum(left, rows, squares, max(total, float(squares.sum())), full=width == limit)


def spectral_norm(delta: LinearMap, random: torch.Generator, columns: int = 8) -> float:
    """||dW||_2 by block power iteration, to about a tenth of a percent, from below."""
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
