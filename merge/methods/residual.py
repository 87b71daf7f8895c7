"""PiSSA (arXiv 2404.02948), DuDe (arXiv 2505.14367) and their like: factors that start as a part of the base.

    W0 = U S V^T,  B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r^T,  W_f = round(W0 - s B0 A0)      (frozen)
    PiSSA   W' = W_f + s B A                         MiLoRA (arXiv 2406.09044): the same of the smallest values
    DuDe    W' = diag(m / rownorm(W_f + s B A)) (W_f + s B A),  m starts as rownorm(W0)

On the original base the frozen part is found again; on a residual base it is the base itself. Which of the two
a folder is, is decided by evidence (`base_evidence`), never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.errors import MismatchError, UnsupportedError
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .canonical_form import ProductRoundedResidual, Residual, SavedResidual

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL_ABOVE = 0.3
RESIDUAL_BELOW = 0.1
# Initialisations that changed the base in a way that cannot be repeated, and why (PEFT 0.21, init_lora_weights).
LOST_INITS = {
    "pissa_niter": "used a randomised SVD, which cannot be repeated",
    "corda": "subtracted directions of training data, which are not in the adapter",
    "lora_ga": "subtracted directions of the first gradient, which are not in the adapter",
    "loftq": "replaced the base by a quantised one",
}
LOST_HINT = (
    "pass --init-adapter FOLDER (saved before training), or merge on the residual base with --base-kind residual"
)
SPARE = 8  # more directions than are kept: the accuracy of a randomised SVD


@dataclass(frozen=True)
class Initial:
    """The factors at initialisation: stored ones, or None where the decomposition of W0 is to be repeated."""

    a: TensorRef | None = None  # (r, in)
    b: TensorRef | None = None  # (out, r)
    dtype: str | None = None  # the residual's dtype as safetensors names it ("BF16"); None: the base's own
    method: str = "svd"  # a key of DECOMPOSITIONS or of LOST_INITS
    scale: float | None = None  # of the stored factors; None: that of the trained ones
    product: str | None = None  # the dtype of the factors and of s B0 A0 where these were rounded (MyTransformers)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.a, self.b) if self.a is not None and self.b is not None else ()


def principal_factors(
    weight: Tensor,  # (out, in), float32
    rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """B0 (out, r) and A0 (r, in), s B0 A0 = the best rank-r approximation of `weight` (PiSSA eq. 2-3).

    A full float32 SVD, in the order of operations of PEFT's LoraLayer.pissa_init, so that the bits agree with
    what was trained beside.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(s[:rank] / scale))
    return u[:, :rank] @ root, root @ vh[:rank]


def orthonormal_factors(
    weight: Tensor,  # (out, in), float32
    rank: int,
    scale: float = 1.0,  # plays no part
) -> tuple[Tensor, Tensor]:
    """B0 (out, r) and A0 (r, in): the first r columns of Q and rows of R, W0 = Q R (OLoRA, arXiv 2406.01775, sec. 3).

    What was subtracted is s Q_r R_r, as PEFT's LoraLayer.olora_init does.
    """
    q, r = torch.linalg.qr(weight)
    return q[:, :rank].contiguous(), r[:rank].contiguous()


def least_factors(
    weight: Tensor,  # (out, in), float32
    rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """B0 (out, r) and A0 (r, in), s B0 A0 = the part of `weight` with its r smallest singular values (MiLoRA eq. 3)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(s[-rank:] / scale))
    return u[:, -rank:] @ root, root @ vh[-rank:]


# (weight (out, in) float32, rank, scale) -> B0 (out, r), A0 (r, in)
DECOMPOSITIONS = {"svd": principal_factors, "qr": orthonormal_factors, "svd_least": least_factors}


def decompose(
    initial: Initial,
    weight: Tensor,  # (out, in): W0 in the base's dtype
    rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """B0 (out, r) and A0 (r, in) of W0: float32, or rounded to `initial.product`.

    Raises UnsupportedError for a method that cannot be repeated.
    """
    if initial.method not in DECOMPOSITIONS:
        raise UnsupportedError(
            f"the initialisation {initial.method!r} cannot be repeated",
            expected=", ".join(DECOMPOSITIONS),
            hint=LOST_HINT,
        )
    if initial.product is None:
        return DECOMPOSITIONS[initial.method](weight.to(torch.float32), rank, scale)
    loaded = weight.to(_residual_dtype(initial, weight)).to(torch.float32)
    b, a = DECOMPOSITIONS[initial.method](loaded, rank, scale)
    return b.to(TORCH_DTYPES[initial.product]), a.to(TORCH_DTYPES[initial.product])


def _residual_dtype(initial: Initial, weight: Tensor) -> torch.dtype:
    return TORCH_DTYPES[initial.dtype] if initial.dtype else weight.dtype


def residual_of(
    initial: Initial,
    rank: int,
    scale: float,
    read: Callable[[TensorRef], Tensor],
    weight: Callable[[], Tensor],
    dtype: torch.dtype,
) -> Residual:
    """What was subtracted from W0 before training, with the dtype that it was rounded to."""
    if initial.refs:
        assert initial.a is not None and initial.b is not None
        stored = scale if initial.scale is None else initial.scale
        b, a = read(initial.b), read(initial.a)
        rounded = TORCH_DTYPES[initial.dtype] if initial.dtype else weight().dtype
    else:
        base, stored = weight(), scale
        b, a = decompose(initial, base, rank, scale)
        rounded = _residual_dtype(initial, base)
    up, down = b.to(dtype) * stored, a.to(dtype)
    if initial.product is None:
        return Residual(up, down, rounded)
    product = TORCH_DTYPES[initial.product]
    return ProductRoundedResidual(up, down, rounded, b.to(product), a.to(product), stored, product)


def saved_residual(
    frozen: Tensor,  # (out, in), in the dtype that it was saved in
    weight: Tensor,  # (out, in): W0
    rank: int,
    dtype: torch.dtype,
    name: str,
) -> SavedResidual:
    """The residual W_f that was saved beside its factors, and the rank-r part of W0 - W_f.

    What is left of the difference is the rounding of W_f. Raises MismatchError where more is left: W_f is then no
    residual of this weight.
    """
    wide = weight.to(torch.float64)
    difference = wide - frozen.to(torch.float64)
    if rank + SPARE < min(difference.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(difference, q=rank + SPARE, niter=4)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    left = float(torch.linalg.vector_norm(difference - up @ down))
    coarse = max(torch.finfo(frozen.dtype).eps, torch.finfo(weight.dtype).eps)
    most = 4 * coarse * float(torch.linalg.vector_norm(wide))
    if left > most:
        raise MismatchError(
            f"{name}: the residual that was saved beside the adapter is not this base less a part of rank {rank}",
            expected=f"a rest of at most {most:.2g} (the rounding to {str(frozen.dtype).removeprefix('torch.')})",
            got=f"{left:.2g}, of a weight of {float(torch.linalg.vector_norm(wide)):.2g}",
            hint="is this the base that was trained on? merge takes the saved residual as it is",
        )
    return SavedResidual(up.to(dtype), down.to(dtype).contiguous(), frozen.dtype, frozen)


def base_evidence(
    weight: Tensor,  # (out, in)
    a: Tensor,  # (r, in), trained
    b: Tensor,  # (out, r), trained
    scale: float | None = None,  # OLoRA: the scale of B A
) -> float:
    """How much of the principal part that the factors started from is in `weight`: its cosine with B A.

    <W, B A> / (||W_r|| ||B A||), W_r the best rank-r part of W. On the original weight it is 1 before training and
    still 0.5 when training added as much as there was; on the residual it is 0, since the span of the
    initial factors was subtracted. OLoRA's factors are not the principal part: with `scale` the result is the
    coefficient <W, s B A> / ||s B A||^2 instead, which is 1 or 0 in the same way.
    """
    weight = weight.to(torch.float32)
    a, b = a.to(torch.float32), b.to(torch.float32)
    if scale is not None:
        inner = ((weight.T @ b) * a.T).sum()
        return float(inner / (scale * ((b.T @ b) * (a @ a.T)).sum().clamp_min(torch.finfo(torch.float32).tiny)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, _ = torch.svd_lowrank(weight, q=min(a.shape[0] + 8, *weight.shape), niter=4)
    inner = ((weight.T @ b) * a.T).sum()
    product = torch.sqrt(((b.T @ b) * (a @ a.T)).sum().clamp_min(0))
    return float(inner / (torch.linalg.vector_norm(singular[: a.shape[0]]) * product))
