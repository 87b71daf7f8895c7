"""VeRA (arXiv 2310.11454): two vectors per weight around random matrices that all weights share.

    dW = diag(lambda_b) B[:out] diag(lambda_d) A[:, :in]          A (r, largest in), B (largest out, r)

A and B are saved, or made again from the seed `projection_prng_key`: Kaiming-uniform (fan_in, gain sqrt 2) from one
torch CPU generator, A before B, as wide as the largest adapted weight (peft.tuners.vera.model._kaiming_init).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.errors import UnsupportedError
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .canonical_form import CanonicalForm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """The shared matrices: stored, or a seed and the sizes that are known once all weights are."""

    a: TensorRef | None  # (r, largest in)
    b: TensorRef | None  # (largest out, r)
    seed: int
    rank: int
    sizes: tuple[int, int] | None = None  # (largest out, largest in)

    def read(self, read: Reader) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) in float32, or as they were stored."""
        if self.a is not None and self.b is not None:
            return read(self.a), read(self.b)
        assert self.sizes is not None, "binding finds the sizes"
        generator = torch.Generator().manual_seed(self.seed)
        out, inner = self.sizes
        return _uniform((self.rank, inner), generator), _uniform((out, self.rank), generator)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class VeraModule(ModuleDefaults):
    """One weight adapted by VeRA. Its width is not in the adapter: -1 until the base is known."""

    name: str
    lambda_b: TensorRef  # (out,)
    lambda_d: TensorRef  # (r,)
    projections: Projections
    inner: int = -1

    @property
    def rank(self) -> int:
        return self.projections.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.lambda_b.shape[0], self.inner

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        shared = (self.projections.a, self.projections.b)
        return (self.lambda_b, self.lambda_d, *(ref for ref in shared if ref is not None))

    @property
    def needs_base(self) -> bool:
        return self.inner < 0

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """The canonical form in `dtype`. Raises UnsupportedError as long as the base is not known."""
        if self.inner < 0:
            raise UnsupportedError(f"{self.name}: VeRA needs the base to know the weight's width", hint="give BASE")
        a, b = self.projections.read(read)
        out, inner = self.shape
        up = read(self.lambda_b).to(dtype)[:, None] * b[:out].to(dtype)
        down = read(self.lambda_d).to(dtype)[:, None] * a[:, :inner].to(dtype)
        return CanonicalForm(up, down)
