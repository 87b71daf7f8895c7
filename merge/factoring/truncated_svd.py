"""Singular value decompositions of a weight's delta, and truncated factors from them.

The truncated SVD is the best rank-R approximation in every unitarily invariant norm (Eckart-Young-Mirsky). It is a
projection: with U_R the first R left singular vectors, the best approximation is U_R (U_R^T dW). To minimise the error
of the layer's output, E ||(dW - T) x||^2 = ||(dW - T) S||_F^2 with S S^T = E x x^T, take U_R from dW S instead:
T = U_R (U_R^T dW) again, and S is never inverted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rank_choice import rank_for_energy

NOISE = 4  # in float32 epsilons of the largest singular value


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading part of the SVD of dW (or of dW S), from which factors of any rank up to `rank` are taken."""

    left: Tensor  # (out, l), orthonormal columns
    right: Tensor  # (l, in) = left^T dW
    squares: Tensor  # (l,) float64: the part of ||dW S||_F^2 in each direction, in descending order
    total: float  # ||dW S||_F^2
    full: bool  # these directions span all of dW

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.squares.numel()

    @property
    def energy(self) -> float:
        """Share (0 .. 1) of ||dW S||_F^2 that these directions hold; 1 for a zero delta."""
        return float(self.squares.sum()) / self.total if self.total > 0 else 1.0

    def stored(self) -> Spectrum:
        """Return a copy on the CPU in float32 that takes less memory while other weights are processed."""
        return replace(
            self,
            left=self.left.to("cpu", torch.float32),
            right=self.right.to("cpu", torch.float32),
            squares=self.squares.cpu(),
        )

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (out, rank) and down (rank, in); column i of up and row i of down have equal norms."""
        right = self.right[:rank]
        root = torch.linalg.vector_norm(right, dim=1).sqrt()
        inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
        return self.left[:, :rank] * root, right * inverse[:, None]

    def rank_for(self, energy: float) -> int | None:
        """Return the smallest rank that keeps `energy` (0 .. 1), or None where this part of the spectrum holds less."""
        if self.full:
            return rank_for_energy(self.squares, energy)
        captured = torch.cumsum(self.squares, 0)
        rank = int((captured < energy * self.total).sum()) + 1
        return rank if rank <= self.rank else None


def core_svd(
    up: Tensor,  # (out, R) float64
    down: Tensor,  # (R, in) float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left (out, K), s (K,) and right (K, in) of the SVD of up @ down, without computing the product (out, in).

    The SVD is computed from the QR cores of the factors; K is min(R, out, in).
    """
    q_up, r_up = torch.linalg.qr(up)  # (out, K), (K, R)
    q_down, r_down = torch.linalg.qr(down.T)  # (in, K'), (K', R)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def product_norms(up: Tensor, down: Tensor) -> tuple[float, float]:
    """Return the Frobenius and the spectral norm of up (out, R) @ down (R, in), float64, without the product."""
    _, r_up = torch.linalg.qr(up, mode="r")
    _, r_down = torch.linalg.qr(down.T, mode="r")
    s = torch.linalg.svdvals(r_up @ r_down.T)
    return float(torch.linalg.vector_norm(s)), float(s[0])


def numerical_rank(s: Tensor) -> int:
    """Return how many of the singular values `s` (descending) exceed the rounding of a float32 file; at least 1.

    The threshold does not depend on the matrix's size, so that small trained values of large weights count as well.
    """
    return max(1, int((s > s[0] * NOISE * torch.finfo(torch.float32).eps).sum()))


def low_rank_spectrum(
    up: Tensor,  # (out, R) float64
    down: Tensor,  # (R, in) float64
    root: Tensor | None = None,  # (in, n) float64: S, where the error of the layer's output is minimised
) -> Spectrum:
    """Return the whole spectrum of up @ down (of up @ down @ S), without numerically zero values."""
    left, s, _ = core_svd(up, down if root is None else down @ root)
    count = numerical_rank(s)
    left = left[:, :count]
    squares = s[:count].square()
    return Spectrum(left, (left.T @ up) @ down, squares, float(s.square().sum()), full=True)


def kronecker_spectrum(
    first: Tensor,  # (o1, i1) float64
    second: Tensor,  # (o2, i2) float64
    limit: int | None = None,
) -> Spectrum:
    """Return the spectrum of kron(first, second) (o1 o2, i1 i2), from the SVDs of its sides.

    Numerically zero values are dropped. At most `limit` directions are computed; `total` includes the others.
    """
    u1, s1, v1 = torch.linalg.svd(first, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(second, full_matrices=False)
    values, order = torch.outer(s1, s2).reshape(-1).sort(descending=True, stable=True)
    nonzero = numerical_rank(values)
    count = nonzero if limit is None else min(nonzero, limit)
    index1, index2 = order[:count] // len(s2), order[:count] % len(s2)
    left = (u1[:, None, index1] * u2[None, :, index2]).reshape(-1, count)
    right = (v1[index1, :, None] * v2[index2, None, :]).reshape(count, -1)
    squares = values.square()
    return Spectrum(left, values[:count, None] * right, squares[:count], float(squares.sum()), full=count == nonzero)


def dense_spectrum(
    delta: Tensor,  # (out, in) float64
    root: Tensor | None = None,  # (in, n) float64
) -> Spectrum:
    """Return the whole spectrum of a dense dW from the eigenvectors of its smaller Gram matrix.

    Several times faster than an SVD. Squares below 1e-16 of the largest are inaccurate, and too small to change an
    energy.
    """
    out, inner = delta.shape
    weighted = delta if root is None else delta @ root
    if out <= weighted.shape[1]:
        squares, vectors = torch.linalg.eigh(weighted @ weighted.T)
        left = vectors.flip(1)
        squares = squares.flip(0).clamp_min(0)
    else:
        squares, vectors = torch.linalg.eigh(weighted.T @ weighted)
        squares = squares.flip(0).clamp_min(0)
        nonzero = max(1, int((squares > squares[0] * squares.numel() * torch.finfo(torch.float64).eps).sum()))
        left, _ = torch.linalg.qr(weighted @ vectors.flip(1)[:, :nonzero])
        squares = squares[:nonzero]
    count = min(left.shape[1], inner)
    left = left[:, :count]
    return Spectrum(left, left.T @ delta, squares[:count], float(weighted.square().sum()), full=True)


def truncate(
    delta: Tensor,  # (out, in)
    rank: int | float,  # an int: the rank; a float below 1: the energy to keep
) -> tuple[Tensor, Tensor]:
    """Return up (out, R) and down (R, in) in delta's dtype: its best approximation of that rank or energy."""
    spectrum = dense_spectrum(delta.to(torch.float64))
    count = min(rank, spectrum.rank) if isinstance(rank, int) else rank_for_energy(spectrum.squares, rank)
    up, down = spectrum.factors(count)
    return up.to(delta.dtype), down.to(delta.dtype)
