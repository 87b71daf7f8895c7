"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353): one adapted weight, to canonical form.

LoRA     W' = W0 + s B A                                     s = alpha / r, or alpha / sqrt(r) for rsLoRA
DoRA     W' = diag(m / rownorm(W0 + s B A)) (W0 + s B A)     norms per output row, as every implementation does
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dude import Initial, residual_of
from .form import CanonicalForm
from .headers import TensorRef

Reader = Callable[[TensorRef], Tensor]


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """s: alpha / r, or alpha / sqrt(r) (rsLoRA eq. 4)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True)
class LoraModule:
    """One weight adapted by LoRA, DoRA, PiSSA or DuDe, known from headers only."""

    name: str  # module path in the model: model.layers.0.self_attn.q_proj
    a: TensorRef  # (r, in);  embeddings: (r, vocabulary)
    b: TensorRef  # (out, r); embeddings: (dim, r)
    scale: float
    magnitude: TensorRef | None = None  # (out,)
    initial: Initial | None = None  # PiSSA and DuDe on the original base
    embedding: bool = False  # the weight is (vocabulary, dim) = (in, out) and is adapted by (B A)^T

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight as the model stores it, Conv1D aside."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.embedding else (out, inner)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        initial = self.initial.refs if self.initial is not None else ()
        return (self.a, self.b, *((self.magnitude,) if self.magnitude else ()), *initial)

    @property
    def needs_base(self) -> bool:
        """True when the base weight must be read to find the factors (an SVD is recomputed)."""
        return self.initial is not None and not self.initial.refs

    def form(self, read: Reader, weight: Callable[[], Tensor], dtype: torch.dtype) -> CanonicalForm:
        """The canonical form in `dtype` on the CPU.

        `read` gives a tensor by reference; `weight` gives W0 (out, in) in the base's own dtype and is called only
        where the base is needed.
        """
        a = read(self.a).to(dtype)  # (r, in)
        b = read(self.b).to(dtype)  # (out, r)
        if self.embedding:
            up, down = a.T.contiguous() * self.scale, b.T.contiguous()
        else:
            up, down = b * self.scale, a
        magnitude = read(self.magnitude).to(dtype).reshape(-1) if self.magnitude is not None else None
        residual = None
        if self.initial is not None:
            residual = residual_of(self.initial, self.rank, self.scale, read, weight, dtype)
        return CanonicalForm(up, down, magnitude=magnitude, residual=residual)
