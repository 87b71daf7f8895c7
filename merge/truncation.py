"""Factors of smallest rank: exact where the rank allows, truncated with a known error where it does not.

The truncated SVD is the best rank-R approximation in every unitarily invariant norm (Eckart-Young-Mirsky).
"""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_rank(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the numerically zero singular values dropped; the factors as they are if there are none.

    up (out, R), down (R, in), float64. Through the QR cores: no (out, in) matrix is formed.
    """
    q_up, r_up = torch.linalg.qr(up)  # (out, R), (R, R)
    q_down, r_down = torch.linalg.qr(down.T)  # (in, R), (R, R)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    # The factors come from float32 files: what is below their precision is noise.
    kept = max(1, int((s > s[0] * max(up.shape[0], down.shape[1]) * torch.finfo(torch.float32).eps).sum()))
    if kept == down.shape[0]:
        return up, down
    root = s[:kept].sqrt()
    return (q_up @ u[:, :kept]) * root, root[:, None] * (vh[:kept] @ q_down.T)


def rank_for_energy(squares: Tensor, energy: float) -> int:
    """The smallest rank that keeps `energy` (0 .. 1) of the squared singular values `squares`, in falling order."""
    kept = torch.cumsum(squares, 0) / squares.sum()
    return min(int((kept < energy).sum()) + 1, squares.numel())


def truncate(
    delta: Tensor,  # (out, in) float32
    rank: int | float,  # an int: the rank; a float below 1: the energy to keep
) -> tuple[Tensor, Tensor]:
    """up (out, R), down (R, in): the best approximation of `delta` of that rank, or that keeps that energy."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    count = min(rank, s.numel()) if isinstance(rank, int) else rank_for_energy(s.to(torch.float64) ** 2, rank)
    root = s[:count].sqrt()
    return u[:, :count] * root, root[:, None] * vh[:count]
