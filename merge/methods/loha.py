"""LoHa (FedPara, arXiv 2108.06098; LyCORIS): the elementwise product of two low-rank matrices.

    dW = s (W1a W1b) * (W2a W2b)
       = s (W1a . W2a) (W1b (.) W2b)      rank <= r1 r2
Row i of (W1a . W2a) is the Kronecker product of rows i of W1a and W2a (face-splitting product). Column j of
(W1b (.) W2b) is the Kronecker product of columns j of W1b and W2b (Khatri-Rao product). The identity holds because the
Hadamard product of two sums of r1 and r2 outer products is the sum of their r1 r2 pairwise products.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .canonical_form import CanonicalForm


@dataclass(frozen=True)
class LohaModule(ModuleDefaults):
    """One weight adapted by LoHa, described by file headers only."""

    name: str
    w1a: TensorRef  # (out, r1)
    w1b: TensorRef  # (r1, in)
    w2a: TensorRef  # (out, r2)
    w2b: TensorRef  # (r2, in)
    scale: float
    magnitude: TensorRef | None = None
    magnitude_dim: int = 0

    @property
    def rank(self) -> int:
        return self.w1b.shape[0] * self.w2b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1a.shape[0], self.w1b.shape[1]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.w1a, self.w1b, self.w2a, self.w2b, *((self.magnitude,) if self.magnitude else ()))

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`. Does not read the base."""
        w1a, w1b, w2a, w2b = (read(ref).to(torch.float64) for ref in (self.w1a, self.w1b, self.w2a, self.w2b))
        out, inner = self.shape
        up = (w1a[:, :, None] * w2a[:, None, :]).reshape(out, self.rank)
        down = (w1b[:, None, :] * w2b[None, :, :]).reshape(self.rank, inner)
        magnitude = read(self.magnitude).to(dtype).reshape(-1) if self.magnitude is not None else None
        return CanonicalForm(
            (up * self.scale).to(dtype), down.to(dtype), magnitude=magnitude, magnitude_dim=self.magnitude_dim
        )
