"""The canonical form that every adapter method reduces to.

    W' = diag(row_scale) (W0 + up @ down) diag(col_scale)

W0 is one linear weight in the Hugging Face orientation, (out, in), y = x W'^T + bias. The row scale of DoRA and DuDe
depends on W0 (d = m / rownorm(W0 + up down)): the form then holds the magnitude m and computes the norms while it is
applied to the rows. PiSSA and DuDe train factors added to a frozen residual that was rounded to the base's dtype: the
form then holds that residual, so that the rounding is reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapter_merge.errors import NumericsError
from adapter_merge.storage.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Residual:
    """The frozen weight to which trained factors are added: W_f = round(W0 - up @ down) (PiSSA eq. 2-4, DuDe eq. 5).

    The rounding must be reproduced: in bfloat16 its error is as large as a small update.
    """

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    dtype: torch.dtype

    def rows_(self, block: Tensor, rows: slice) -> Tensor:
        """Return the rows of W_f, (n, in) in `dtype`, that belong to `block` (n, in) of W0.

        The difference is computed in float32, as at training, whatever the block's dtype: rounding a float64
        difference would give other bits than the frozen weight of the training.
        """
        product = self.up[rows].to(torch.float32) @ self.down.to(torch.float32)
        return torch.sub(block.to(torch.float32), product).to(self.dtype)

    def transposed(self) -> Residual:
        """Return the residual of W0^T, (in, out)."""
        return Residual(self.down.T.contiguous(), self.up.T.contiguous(), self.dtype)

    @property
    def is_rounded(self) -> bool:
        """True when W_f differs from W0 - up @ down by more than float32 rounding."""
        return self.dtype not in (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class SavedResidual(Residual):
    """A residual that was saved as a matrix; up @ down is the low-rank part of W0 - W_f, the rest is rounding."""

    saved: Tensor | None = None  # (out, in), in its own dtype

    def rows_(self, block: Tensor, rows: slice) -> Tensor:
        """Return the rows of W_f as they were saved; the values of `block` are not used."""
        assert self.saved is not None
        return self.saved[rows].to(block.device)

    def transposed(self) -> SavedResidual:
        assert self.saved is not None
        turned = self.saved.T.contiguous()
        return SavedResidual(self.down.T.contiguous(), self.up.T.contiguous(), self.dtype, turned)

    @property
    def is_rounded(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class ProductRoundedResidual(Residual):
    """The residual as MyTransformers computes it: W_f = round(round(W0) - round(s round(b @ a))).

    The model was loaded in `dtype` before it was decomposed. b, a, b @ a and s b @ a are in the dtype `product`. The
    scaled product is rounded to `dtype`, and so is the difference, which is computed in float32. up @ down is s b @ a
    without these roundings.
    """

    b: Tensor | None = None  # (out, r), in `product`
    a: Tensor | None = None  # (r, in), in `product`
    scale: float = 1.0
    product: torch.dtype | None = None

    def rows_(self, block: Tensor, rows: slice) -> Tensor:
        """Return the rows of W_f, (n, in) in `dtype`; the product is summed in float32 and then rounded."""
        assert self.a is not None and self.b is not None
        b, a = (factor.to(block.device, torch.float32) for factor in (self.b[rows], self.a))
        subtracted = ((b @ a).to(self.product) * self.scale).to(self.dtype)
        return (block.to(self.dtype).to(torch.float32) - subtracted.to(torch.float32)).to(self.dtype)

    def transposed(self) -> ProductRoundedResidual:
        assert self.a is not None and self.b is not None
        b, a = self.a.T.contiguous(), self.b.T.contiguous()
        return ProductRoundedResidual(
            self.down.T.contiguous(), self.up.T.contiguous(), self.dtype, b, a, self.scale, self.product
        )


@dataclass(frozen=True, eq=False)
class CanonicalForm:
    """The change of one weight by one adapter. Immutable; all tensors are float32 or float64 on one device.

    At most one of `row_scale` and `magnitude` is set. `magnitude_dim` is 0 for norms of the
    output rows (the implementations of DoRA and DuDe, PEFT) and 1 for norms of the input columns.
    """

    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    row_scale: Tensor | None = None  # (out,)
    col_scale: Tensor | None = None  # (in,)
    magnitude: Tensor | None = None  # (out,) if magnitude_dim == 0 else (in,)
    magnitude_dim: int = 0
    residual: Residual | None = None

    def __post_init__(self) -> None:
        out, inner = self.up.shape
        assert self.down.shape[0] == inner, "up and down disagree about the rank"
        assert self.row_scale is None or self.row_scale.shape == (out,)
        assert self.col_scale is None or self.col_scale.shape == (self.down.shape[1],)
        if self.magnitude is not None:
            assert self.row_scale is None and self.col_scale is None, "magnitude excludes row_scale and col_scale"
            assert self.magnitude.shape == ((out,) if self.magnitude_dim == 0 else (self.down.shape[1],))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """R, the inner size of up @ down; the rank of the unscaled update is at most this."""
        return self.down.shape[0]

    @property
    def is_low_rank(self) -> bool:
        """True when W' - W0 has rank <= R (plus the residual's), so that LoRA factors are exact."""
        return self.row_scale is None and self.col_scale is None and self.magnitude is None

    @property
    def needs_pass(self) -> bool:
        """True when a pass over all rows of W0 must compute column norms first (see `with_pass_sums`)."""
        return self.magnitude is not None and self.magnitude_dim == 1

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CanonicalForm:
        """Return the same form on another device or in another dtype."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        residual = self.residual
        if residual is not None:
            residual = replace(
                residual,
                up=residual.up.to(device=device, dtype=dtype),
                down=residual.down.to(device=device, dtype=dtype),
            )
        return replace(
            self,
            up=self.up.to(device=device, dtype=dtype),
            down=self.down.to(device=device, dtype=dtype),
            row_scale=move(self.row_scale),
            col_scale=move(self.col_scale),
            magnitude=move(self.magnitude),
            residual=residual,
        )

    def transposed(self) -> CanonicalForm:
        """Return the form that acts on W0^T (in, out), for weights that are stored transposed (GPT-2's Conv1D)."""
        residual = self.residual
        if residual is not None:
            residual = residual.transposed()
        return CanonicalForm(
            up=self.down.T.contiguous(),
            down=self.up.T.contiguous(),
            row_scale=self.col_scale,
            col_scale=self.row_scale,
            magnitude=self.magnitude,
            magnitude_dim=self.magnitude_dim if self.magnitude is None else 1 - self.magnitude_dim,
            residual=residual,
        )

    # -- one block of rows -----------------------------------------------------------------------------

    def add_low_rank_(self, block: Tensor, start: int) -> Tensor:
        """Turn `block` (n, in), the rows start .. start+n of W0, into those of W_f + up @ down, in place; return it."""
        rows = slice(start, start + block.shape[0])
        if self.residual is not None:
            block.copy_(self.residual.rows_(block, rows))
        return block.addmm_(self.up[rows], self.down)

    def apply_(self, block: Tensor, start: int) -> Tensor | None:
        """Turn `block` (n, in), the rows start .. start+n of W0, into the same rows of W', in place.

        Returns the rows' scale (n,), or None where there is none. Raises NumericsError when a row of W_f + up @ down
        is zero but has a magnitude; on CUDA that row becomes NaN instead, which the caller must refuse.
        """
        assert not self.needs_pass, "call with_pass_sums before apply_"
        rows = slice(start, start + block.shape[0])
        self.add_low_rank_(block, start)
        scale = None
        if self.magnitude is not None:
            scale = self._scale_of(self.magnitude[rows], torch.linalg.vector_norm(block, dim=1), start)
        elif self.row_scale is not None:
            scale = self.row_scale[rows]
        if scale is not None:
            block.mul_(scale[:, None])
        if self.col_scale is not None:
            block.mul_(self.col_scale)
        return scale

    def delta_rows(self, block: Tensor, start: int) -> Tensor:
        """Return rows start .. start+n of dW = W' - W0 for `block` (n, in) of W0, which is not changed.

        To avoid cancellation, dW is computed as up down for a plain form, and as diag(d - 1) W0 + diag(d) up down
        with a row scale d; only a residual or a column scale needs the difference W' - W0.
        """
        rows = slice(start, start + block.shape[0])
        if self.is_low_rank and self.residual is None:
            return self.up[rows] @ self.down
        if self.residual is not None or self.col_scale is not None:
            after = block.clone()
            self.apply_(after, start)
            return after.sub_(block)
        product = self.up[rows] @ self.down
        scale = self.row_scale[rows] if self.row_scale is not None else None
        if scale is None:
            assert self.magnitude is not None
            norm = torch.linalg.vector_norm(product + block, dim=1)
            scale = self._scale_of(self.magnitude[rows], norm, start)
        return product.mul_(scale[:, None]).addcmul_(block, (scale - 1)[:, None])

    # -- column norms (two passes) ---------------------------------------------------------------------

    def pass_sums(self, block: Tensor, start: int) -> Tensor:
        """Return the column sums of squares (in,), float64, of this block's rows of W_f + up @ down.

        `block` is overwritten.
        """
        return self.add_low_rank_(block, start).to(torch.float64).square_().sum(0)

    def with_pass_sums(self, squares: Tensor) -> CanonicalForm:
        """Return the form with its column scale m / colnorm; `squares` (in,) is the total of all `pass_sums`."""
        assert self.needs_pass and self.magnitude is not None
        scale = self._scale_of(self.magnitude.to(torch.float64), squares.sqrt(), 0)
        return replace(self, magnitude=None, col_scale=scale.to(self.up.dtype))

    # -- whole weights ---------------------------------------------------------------------------------

    def bound_to(self, weight: Tensor) -> CanonicalForm:
        """Return the form with a row or column scale in place of its magnitude; `weight` is W0 (out, in)."""
        if self.magnitude is None:
            return self
        if self.needs_pass:
            return self.with_pass_sums(self.pass_sums(weight.clone(), 0))
        scale = self._scale_of(
            self.magnitude, torch.linalg.vector_norm(self.add_low_rank_(weight.clone(), 0), dim=1), 0
        )
        return replace(self, magnitude=None, row_scale=scale)

    def delta(self, weight: Tensor) -> Tensor:
        """Return dW (out, in) for the whole weight W0 (out, in), in the form's dtype."""
        return self.bound_to(weight).delta_rows(weight, 0)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W' (out, in) for the whole weight W0 (out, in), in the form's dtype."""
        block = weight.clone()
        self.bound_to(weight).apply_(block, 0)
        return block

    def folded(self) -> CanonicalForm:
        """Return the form without its residual: up' = [up, -up0], down' = [down; down0] on the original W0.

        The result is exact except for the rounding of the residual, which low-rank factors cannot express.
        """
        if self.residual is None:
            return self
        return replace(
            self,
            up=torch.cat((self.up, -self.residual.up), dim=1),
            down=torch.cat((self.down, self.residual.down), dim=0),
            residual=None,
        )

    def _scale_of(self, magnitude: Tensor, norm: Tensor, start: int) -> Tensor:
        """Return magnitude / norm, 1 where both are 0; raise NumericsError, or give NaN, where only the norm is 0."""
        # On CUDA a check would wait for the device in every block: such a row becomes NaN, which the engine refuses.
        checks = norm.device.type != "cuda" and not torch.compiler.is_compiling()
        if checks and bool(norm.all()):
            return magnitude / norm
        zero = (norm == 0) & (magnitude != 0)
        if not checks:
            scale = torch.where(norm == 0, torch.ones_like(norm), magnitude / norm)
            return scale.masked_fill(zero, torch.nan)
        if bool(zero.any()):
            row = start + int(zero.nonzero()[0])
            raise NumericsError(
                f"row {row} of W0 + up @ down is zero but has a magnitude: its direction is undefined",
                hint="is this the base that the adapter was trained on?",
            )
        return torch.where(norm == 0, torch.ones_like(norm), magnitude / norm)
