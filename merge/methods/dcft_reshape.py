"""The reshape form of DCFT (github youseefmoemen/DCFT): the deconvolution is reshaped, not transposed, to (out, in).

    P = B A                                             (in/d, out/d), rank k
    Delta = conv_transpose2d(P, deconv.weight, stride d) + deconv.bias          (in, out)
    dW = Delta.view(out, in),  y = x (W0 + dW)^T                                without scale or ranknum

Viewing (in, out), row-major, as (out, in) divides its rows into pieces of g = gcd(in, out) elements: Delta = X Y of
rank R has exact factors of rank R (in / g) (out / g) after the view. Where that rank is not below min(in, out), one
factor is the dense matrix and the other the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .canonical_form import CanonicalForm
from .dcft import channel_factors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DcftReshapeModule(ModuleDefaults):
    """One weight adapted by the reshape form of DCFT, described by file headers only."""

    name: str
    b: TensorRef  # (in/d, k), or (channels, in/d, k)
    a: TensorRef  # (k, out/d), or (channels, k, out/d)
    c: TensorRef  # (channels, 1, d, d)
    bias: TensorRef | None  # (1,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.a.shape[-1] * self.c.shape[3], self.b.shape[-2] * self.c.shape[2]

    @property
    def rank(self) -> int:
        out, inner = self.shape
        g = math.gcd(out, inner)
        image = self.c.shape[0] * self.a.shape[-2] * min(self.c.shape[2:]) + (self.bias is not None)
        return min(image * (inner // g) * (out // g), out, inner)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.b, self.a, self.c, *((self.bias,) if self.bias is not None else ()))

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`. Does not read the base."""
        stride = (self.c.shape[2], self.c.shape[3])
        # channel_factors gives Delta^T = up down; Delta = down^T up^T.
        channels, rank = self.c.shape[0], self.a.shape[-2]
        images = read(self.b).reshape(channels, -1, rank).mT, read(self.a).reshape(channels, rank, -1).mT
        up, down = channel_factors(*images, read(self.c)[:, 0], stride, 1.0)
        image_left, image_right = down.T, up.T  # (in, R), (R, out)
        if self.bias is not None:
            constant = read(self.bias).to(image_left).reshape(1, 1)
            image_left = torch.cat((image_left, torch.ones_like(image_left[:, :1])), 1)
            image_right = torch.cat((image_right, constant.expand(1, image_right.shape[1])))
        new_up, new_down = reshaped_factors(image_left, image_right)
        return CanonicalForm(new_up.to(dtype), new_down.to(dtype))


def reshaped_factors(
    left: Tensor,  # (n, R)
    right: Tensor,  # (R, m)
) -> tuple[Tensor, Tensor]:
    """Return up (m, Q) and down (Q, n) with up @ down == (left @ right).view(m, n), row-major."""
    n, rank = left.shape
    m = right.shape[1]
    g = math.gcd(n, m)
    wide, tall = m // g, n // g  # pieces in a row of the old matrix, and of the new one
    if rank * wide * tall >= min(n, m):
        dense = (left @ right).reshape(m, n)
        if m <= n:
            return torch.eye(m, dtype=dense.dtype), dense
        return dense, torch.eye(n, dtype=dense.dtype)
    # Piece p of the flat matrix is piece p % wide of old row p // wide, and piece p % tall of new row p // tall.
    rows, columns = torch.arange(m)[:, None], torch.arange(tall)[None, :]
    piece = rows * tall + columns  # (m, tall)
    old_row, old_piece = piece // wide, piece % wide
    up = left.new_zeros(m, tall, wide, rank)
    up[rows, columns, old_piece] = left[old_row]
    down = left.new_zeros(tall, wide, rank, tall, g)
    pieces = right.reshape(rank, wide, g).transpose(0, 1)  # (wide, R, g)
    for column in range(tall):
        down[column, :, :, column] = pieces
    return up.reshape(m, -1), down.reshape(-1, n)
