"""PiSSA (arXiv 2404.02948), OLoRA, MiLoRA and DuDe (arXiv 2505.14367): factors initialised from the base weight.

    W0 = U S V^T,  B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r^T,  W_f = round(W0 - s B0 A0)      (frozen)
    PiSSA   W' = W_f + s B A                         MiLoRA (arXiv 2406.09044): with the smallest singular values
    DuDe    W' = diag(m / rownorm(W_f + s B A)) (W_f + s B A),  m starts as rownorm(W0)

On the original base W_f is computed again; a residual base is W_f itself. `measure_base_evidence` distinguishes them.
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

ORIGINAL_ABOVE = 0.3  # measure_base_evidence of an original base is at least this
RESIDUAL_BELOW = 0.1  # measure_base_evidence of a residual base is at most this
# Initialisations (PEFT 0.21, init_lora_weights) whose change of the base cannot be computed again, and the reason.
UNREPEATABLE_INITS = {
    "pissa_niter": "used a randomised SVD, which cannot be repeated",
    "corda": "subtracted directions of training data, which are not in the adapter",
    "lora_ga": "subtracted directions of the first gradient, which are not in the adapter",
    "loftq": "replaced the base by a quantised one",
}
UNREPEATABLE_HINT = (
    "pass --init-adapter FOLDER (saved before training), or merge on the residual base with --base-kind residual"
)
OVERSAMPLING = 8  # directions of a randomised SVD beyond those that are kept (Halko et al., arXiv 0909.4061)


@dataclass(frozen=True)
class Initial:
    """The factors at initialisation: stored ones, or None where the decomposition of W0 must be repeated."""

    a: TensorRef | None = None  # (r, in)
    b: TensorRef | None = None  # (out, r)
    dtype: str | None = None  # the residual's dtype as safetensors names it ("BF16"); None: the base's own
    method: str = "svd"  # a key of DECOMPOSITIONS or of UNREPEATABLE_INITS
    scale: float | None = None  # of the stored factors; None: the scale of the trained ones
    product: str | None = None  # the dtype that the factors and s B0 A0 were rounded to (MyTransformers); None: not

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.a, self.b) if self.a is not None and self.b is not None else ()


def principal_factors(
    weight: Tensor,  # (out, in), float32
    rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return B0 (out, r) and A0 (r, in) with s B0 A0 = the best rank-r approximation of `weight` (PiSSA eq. 2-3).

    Uses a full float32 SVD in the order of operations of PEFT's LoraLayer.pissa_init, so that the residual has the
    bits that it had at training.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(s[:rank] / scale))
    return u[:, :rank] @ root, root @ vh[:rank]


def orthonormal_factors(
    weight: Tensor,  # (out, in), float32
    rank: int,
    scale: float = 1.0,  # not used
) -> tuple[Tensor, Tensor]:
    """Return B0 (out, r) and A0 (r, in): the first r columns of Q and rows of R, W0 = Q R (OLoRA, arXiv 2406.01775).

    PEFT's LoraLayer.olora_init subtracts s Q_r R_r from W0.
    """
    q, r = torch.linalg.qr(weight)
    return q[:, :rank].contiguous(), r[:rank].contiguous()


def least_factors(
    weight: Tensor,  # (out, in), float32
    rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return B0 (out, r) and A0 (r, in) with s B0 A0 = the part of `weight` of its r smallest singular values.

    Source: MiLoRA, arXiv 2406.09044, eq. 3.
    """
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
    """Return B0 (out, r) and A0 (r, in) of W0, float32 or rounded to `initial.product`.

    Raises UnsupportedError for a method that cannot be repeated.
    """
    if initial.method not in DECOMPOSITIONS:
        raise UnsupportedError(
            f"the initialisation {initial.method!r} cannot be repeated",
            expected=", ".join(DECOMPOSITIONS),
            hint=UNREPEATABLE_HINT,
        )
    if initial.product is None:
        return DECOMPOSITIONS[initial.method](weight.to(torch.float32), rank, scale)
    loaded = weight.to(_residual_dtype(initial, weight)).to(torch.float32)
    b, a = DECOMPOSITIONS[initial.method](loaded, rank, scale)
    return b.to(TORCH_DTYPES[initial.product]), a.to(TORCH_DTYPES[initial.product])


def _residual_dtype(initial: Initial, weight: Tensor) -> torch.dtype:
    """Return the dtype that the residual was rounded to: the stated one, or the base's."""
    return TORCH_DTYPES[initial.dtype] if initial.dtype else weight.dtype


def make_residual(
    initial: Initial,
    rank: int,
    scale: float,
    read: Callable[[TensorRef], Tensor],
    weight: Callable[[], Tensor],
    dtype: torch.dtype,
) -> Residual:
    """Return the residual: the factors that were subtracted from W0 before training, and the dtype it was rounded to.

    Reads W0 by `weight` where the factors or the dtype are not stored. Raises UnsupportedError as `decompose` does.
    """
    if initial.refs:
        assert initial.a is not None and initial.b is not None
        factor_scale = scale if initial.scale is None else initial.scale
        b, a = read(initial.b), read(initial.a)
        rounded = TORCH_DTYPES[initial.dtype] if initial.dtype else weight().dtype
    else:
        base, factor_scale = weight(), scale
        b, a = decompose(initial, base, rank, scale)
        rounded = _residual_dtype(initial, base)
    up, down = b.to(dtype) * factor_scale, a.to(dtype)
    if initial.product is None:
        return Residual(up, down, rounded)
    product = TORCH_DTYPES[initial.product]
    return ProductRoundedResidual(up, down, rounded, b.to(product), a.to(product), factor_scale, product)


def make_saved_residual(
    frozen: Tensor,  # (out, in), in the dtype that it was saved in
    weight: Tensor,  # (out, in): W0
    rank: int,
    dtype: torch.dtype,
    name: str,
) -> SavedResidual:
    """Return the residual W_f that was saved beside its factors, with the rank-r part of W0 - W_f as up @ down.

    The remainder W0 - W_f - up @ down must be the rounding of W_f. Raises MismatchError where it is larger: W_f is then
    not the residual of this weight.
    """
    wide = weight.to(torch.float64)
    difference = wide - frozen.to(torch.float64)
    if rank + OVERSAMPLING < min(difference.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(difference, q=rank + OVERSAMPLING, niter=4)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    remainder = float(torch.linalg.vector_norm(difference - up @ down))
    eps = max(torch.finfo(frozen.dtype).eps, torch.finfo(weight.dtype).eps)
    limit = 4 * eps * float(torch.linalg.vector_norm(wide))
    if remainder > limit:
        raise MismatchError(
            f"{name}: the residual saved beside the adapter is not this base minus a matrix of rank {rank}",
            expected=f"a remainder of at most {limit:.2g} (the rounding to {str(frozen.dtype).removeprefix('torch.')})",
            got=f"{remainder:.2g}, for a weight of norm {float(torch.linalg.vector_norm(wide)):.2g}",
            hint="is this the base of the training? merge uses the saved residual without this check",
        )
    return SavedResidual(up.to(dtype), down.to(dtype).contiguous(), frozen.dtype, frozen)


def measure_base_evidence(
    weight: Tensor,  # (out, in)
    a: Tensor,  # (r, in), trained
    b: Tensor,  # (out, r), trained
    scale: float | None = None,  # OLoRA: the scale of B A
) -> float:
    """Return the cosine <W, B A> / (||W_r|| ||B A||) of `weight` W and the trained product B A.

    W_r is the best rank-r approximation of W. On the original weight the cosine is 1 before training, and still 0.5
    when training has added a change as large as the initial product. On the residual it is 0, since the initial factors
    were subtracted.
    OLoRA's factors are not the principal part: with `scale` the result is the coefficient <W, s B A> / ||s B A||^2,
    which is 1 or 0 in the same way.
    """
    weight = weight.to(torch.float32)
    a, b = a.to(torch.float32), b.to(torch.float32)
    if scale is not None:
        inner = ((weight.T @ b) * a.T).sum()
        return float(inner / (scale * ((b.T @ b) * (a @ a.T)).sum().clamp_min(torch.finfo(torch.float32).tiny)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, _ = torch.svd_lowrank(weight, q=min(a.shape[0] + OVERSAMPLING, *weight.shape), niter=4)
    inner = ((weight.T @ b) * a.T).sum()
    product = torch.sqrt(((b.T @ b) * (a @ a.T)).sum().clamp_min(0))
    return float(inner / (torch.linalg.vector_norm(singular[: a.shape[0]]) * product))
