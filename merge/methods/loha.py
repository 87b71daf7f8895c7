"""LoHa (FedPara, arXiv 2108.06098; LyCORIS): the elementwise product of two low-rank matrices.

    dW = s (W1a W1b) * (W2a W2b)
       = s (W1a . W2a) (W1b (.) W2b)      rank <= r1 r2
Row i of (W1a . W2a) is the Kronecker product of rows i of W1a and W2a (face-splitting product). Column j of
(W1b (.) W2b) is the Kronecker product of columns j of W1b and W2b (Khatri-Rao product). The identity holds because the
Hadamard product of two sums of r1 and r2 outer products is the sum of their r1 r2 pairwise products.
A convolution is the matrix (out, in k k); with cores each of the two matrices is one of tucker.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .canonical_form import CanonicalForm
from .tucker import kernel_size, tucker_down


@dataclass(frozen=True)
class LohaModule(ModuleDefaults):
    """One weight adapted by LoHa, described by file headers only."""

    name: str
    w1a: TensorRef  # (out, r1); with cores (r1, out)
    w1b: TensorRef  # (r1, in)
    w2a: TensorRef  # (out, r2); with cores (r2, out)
    w2b: TensorRef  # (r2, in)
    scale: float
    magnitude: TensorRef | None = None
    magnitude_dim: int = 0
    cores: tuple[TensorRef, TensorRef] | None = None  # (r1, r1, k, k), (r2, r2, k, k)

    @property
    def rank(self) -> int:
        return self.w1b.shape[0] * self.w2b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        if self.cores is not None:
            return self.w1a.shape[1], self.w1b.shape[1] * kernel_size(self.cores[0])
        return self.w1a.shape[0], self.w1b.shape[1]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        own = (*(self.cores or ()), *((self.magnitude,) if self.magnitude else ()))
        return (self.w1a, self.w1b, self.w2a, self.w2b, *own)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`. Does not read the base."""
        w1a, w1b, w2a, w2b = (read(ref).to(torch.float64) for ref in (self.w1a, self.w1b, self.w2a, self.w2b))
        if self.cores is not None:
            core1, core2 = (read(ref).to(torch.float64) for ref in self.cores)
            w1a, w1b, w2a, w2b = w1a.T, tucker_down(core1, w1b), w2a.T, tucker_down(core2, w2b)
        out, inner = self.shape
        up = (w1a[:, :, None] * w2a[:, None, :]).reshape(out, self.rank)
        down = (w1b[:, None, :] * w2b[None, :, :]).reshape(self.rank, inner)
        magnitude = read(self.magnitude).to(dtype).reshape(-1) if self.magnitude is not None else None
        return CanonicalForm(
            (up * self.scale).to(dtype), down.to(dtype), magnitude=magnitude, magnitude_dim=self.magnitude_dim
        )
