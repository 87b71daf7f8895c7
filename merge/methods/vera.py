"""VeRA (arXiv 2310.11454): two trained vectors per weight, and random matrices A and B that all weights share.

    dW = diag(lambda_b) B[:out] diag(lambda_d) A[:, :in]          A (r, largest in), B (largest out, r)

A and B are saved, or drawn again from the seed `projection_prng_key`: Kaiming-uniform (fan_in, gain sqrt 2) from one
torch CPU generator, A before B, with the size of the largest adapted weight (peft.tuners.vera.model._kaiming_init).
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
    """The shared matrices A and B: stored, or described by a seed and sizes that binding fills in."""

    a: TensorRef | None  # (r, largest in)
    b: TensorRef | None  # (largest out, r)
    seed: int
    rank: int
    sizes: tuple[int, int] | None = None  # (largest out, largest in)

    def read(self, read: Reader) -> tuple[Tensor, Tensor]:
        """Return A (r, largest in) and B (largest out, r), in the stored dtype, or drawn in float32."""
        if self.a is not None and self.b is not None:
            return read(self.a), read(self.b)
        assert self.sizes is not None, "binding must set the sizes first"
        generator = torch.Generator().manual_seed(self.seed)
        out, inner = self.sizes
        return _draw_kaiming_uniform((self.rank, inner), generator), _draw_kaiming_uniform((out, self.rank), generator)


def _draw_kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return `shape` (fan_out, fan_in) float32 as peft.tuners.vera.model._kaiming_init draws it."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class VeraModule(ModuleDefaults):
    """One weight adapted by VeRA. The adapter does not hold the weight's width: `inner` is -1 until binding."""

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
        return (self.lambda_b, self.lambda_d, *self.untrained)

    @property
    def untrained(self) -> tuple[TensorRef, ...]:
        return tuple(ref for ref in (self.projections.a, self.projections.b) if ref is not None)

    @property
    def needs_base(self) -> bool:
        return self.inner < 0

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`. Raises UnsupportedError before the module is bound to a base."""
        if self.inner < 0:
            raise UnsupportedError(f"{self.name}: VeRA needs the base to know the weight's width", hint="give BASE")
        a, b = self.projections.read(read)
        out, inner = self.shape
        up = read(self.lambda_b).to(dtype)[:, None] * b[:out].to(dtype)
        down = read(self.lambda_d).to(dtype)[:, None] * a[:, :inner].to(dtype)
        return CanonicalForm(up, down)
