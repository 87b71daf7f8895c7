"""LoKr (LyCORIS, arXiv 2309.14859): a Kronecker product of two small matrices, each stored full or as two factors.

dW = s kron(W1, W2),  W1 = w1 or w1_a w1_b,  W2 = w2 or w2_a w2_b
   = s kron(U1, U2) kron(D1, D2)  with W1 = U1 D1, W2 = U2 D2         rank <= rank(W1) rank(W2)
A convolution is the matrix (out, in k k), with W2 (o2, i2 k k); with a core W2 is the matrix of tucker.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .canonical_form import CanonicalForm
from .tucker import kernel_size, tucker_down

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LokrModule(ModuleDefaults):
    """One weight adapted by LoKr, described by file headers only. Each of W1 and W2 is (full,) or (a, b)."""

    name: str
    w1: tuple[TensorRef, ...]  # ((o1, i1),) or ((o1, r), (r, i1))
    w2: tuple[TensorRef, ...]  # ((o2, i2),) or ((o2, r), (r, i2)); with a core ((r, o2), (r, i2))
    scale: float
    magnitude: TensorRef | None = None
    magnitude_dim: int = 0
    core: TensorRef | None = None  # (r, r, k, k)

    @property
    def rank(self) -> int:
        return _rank(self.w1) * (_rank(self.w2) if self.core is None else self.core.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) = (o1 o2, i1 i2)."""
        rows = self.w2[0].shape[0 if self.core is None else 1]
        columns = self.w2[-1].shape[1] * kernel_size(self.core)
        return self.w1[0].shape[0] * rows, self.w1[-1].shape[1] * columns

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (*self.w1, *self.w2, *(ref for ref in (self.core, self.magnitude) if ref is not None))

    def sides(self, read: Reader) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return W1 and W2 in float64, each whole or as the two factors whose product it is."""
        first, second = (tuple(read(ref).to(torch.float64) for ref in side) for side in (self.w1, self.w2))
        if self.core is not None:
            up = second[0].T.clone(memory_format=torch.contiguous_format)
            second = (up, tucker_down(read(self.core).to(torch.float64), second[1]))
        return first, second

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`. Does not read the base."""
        first, second = self.sides(read)
        (up1, down1), (up2, down2) = _split_factor(first), _split_factor(second)
        magnitude = read(self.magnitude).to(dtype).reshape(-1) if self.magnitude is not None else None
        return CanonicalForm(
            (torch.kron(up1, up2) * self.scale).to(dtype),
            torch.kron(down1, down2).to(dtype),
            magnitude=magnitude,
            magnitude_dim=self.magnitude_dim,
        )


def _rank(factor: tuple[TensorRef, ...]) -> int:
    """Return an upper bound of the rank of W1 or W2."""
    return min(factor[0].shape) if len(factor) == 1 else factor[0].shape[1]


def _split_factor(factor: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return up (o, R) and down (R, i) with up @ down == W1 or W2; R is the smaller side of a full matrix."""
    if len(factor) == 2:
        return factor[0], factor[1]
    full = factor[0]
    rows, columns = full.shape
    if rows <= columns:
        return torch.eye(rows, dtype=full.dtype), full
    return full, torch.eye(columns, dtype=full.dtype)
