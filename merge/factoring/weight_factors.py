"""Factorisation of one weight: the choice of the algorithm, the factors, and their errors.

exact        the canonical form itself, without numerically zero singular values; DoRA and DuDe with their row scale
             (LoKr: from the SVDs of its two sides)
cores        truncated by the QR cores of up @ down: LoRA, rsLoRA, PiSSA, DCFT, and any form with --scale exact
randomised   the leading part of diag(d - 1) W0 + diag(d) up down from products with it
dense        the same from its Gram matrix, where most of the spectrum is needed

A combination whose delta is not a sum of factors and scales (TIES, DARE, pruning) is factored from its dense delta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundModule
from adapter_merge.combine.combined_weight import CombinedModule, CombinedWeight
from adapter_merge.errors import UnsupportedError
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.storage.tensor_io import read_tensor

from .certificate import SPECTRUM_LENGTH, LayerFigures, low_rank_errors, measure
from .delta_operator import AnyDelta, BaseRows, DeltaOperator, DenseDelta
from .randomised_svd import generator, oversampled, randomised_spectrum
from .truncated_svd import Spectrum, core_svd, dense_spectrum, kronecker_spectrum, low_rank_spectrum, numerical_rank

FIRST_WIDTH = 32  # rank of the first attempt to reach an energy
DENSE_SHARE = 0.35  # of the full rank; from here on the Gram matrix is cheaper than iterations
SMALLEST_SCALE = 1e-6  # of the largest |d|; rows with a smaller scale get zero factors instead of a division


@dataclass(frozen=True, eq=False)
class Factored:
    """Factors of one weight, float32 on the CPU, and their errors."""

    name: str  # module path
    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    magnitude: Tensor | None  # (out,)
    row_scale: Tensor | None  # (out,)
    figures: LayerFigures


class Factoriser:
    """Factoriser of one adapted weight.

    weight: the module bound to its base weight; None where there is no base.
    keep_scale: write the row scale d beside truncated factors, instead of truncating diag(d - 1) W0 as well.
    """

    def __init__(
        self,
        module: AdaptedModule,
        weight: BoundModule | None,
        device: torch.device,
        *,
        keep_scale: bool = False,
        root: Tensor | None = None,  # (in, n) float32 on the CPU: S of the activations
    ) -> None:
        self.module, self.weight, self.device, self.keep_scale = module, weight, device, keep_scale
        self.root = None if root is None else root.to(device)
        self._delta: AnyDelta | None = None
        combined = module if isinstance(module, CombinedWeight) else None
        layer = isinstance(module, PeftLayerModule) and module.low_rank is None
        self.dense = layer or (combined is not None and not combined.has_form)
        self.in_memory = self.dense or (combined is not None and combined.is_rounded)
        if self.dense:  # the delta has no form: use factors of rank 0
            assert weight is not None, "a module that needs its base is bound to one"
            self.form = CanonicalForm(torch.zeros(module.shape[0], 0), torch.zeros(0, module.shape[1]))
        else:
            self.form = module.form(read_tensor, self._read_weight, torch.float64).to(device)

    def _read_weight(self) -> Tensor:
        """Read W0 (out, in) in the base's dtype."""
        assert self.weight is not None, "a module that needs its base is bound to one"
        return self.weight.oriented_weight()

    @property
    def delta(self) -> AnyDelta:
        """dW as a linear map. The first use reads the base."""
        if self._delta is None:
            assert self.weight is not None
            rows = BaseRows(self.weight, self.device)
            if self.in_memory:
                self._delta = DenseDelta(self._dense_delta(), rows, self.form.row_scale)
            else:
                self._delta = DeltaOperator(self.form, rows)
        return self._delta

    def _dense_delta(self) -> Tensor:
        """Compute dW (out, in) in float64 on the device, for a change that no factors describe."""
        if isinstance(self.weight, CombinedModule):
            return self.weight.dense_delta(self.device)
        assert self.weight is not None
        weight = self._read_weight().to(torch.float64)
        return self.module.edit(read_tensor, self._read_weight, torch.float64).delta_rows(weight, 0).to(self.device)

    def close(self) -> None:
        """Free the base's rows and the delta; the form is kept."""
        self._delta = None

    @property
    def scaled(self) -> bool:
        """True when the form has scales or magnitudes, so that dW has full rank."""
        return not self.form.is_low_rank

    @property
    def through_cores(self) -> bool:
        """True when the truncation is computed from factors only, without products with W0."""
        if self.dense:
            return False
        return not self.scaled or (self.keep_scale and self.form.col_scale is None and not self.form.needs_pass)

    def exact(self) -> Factored:
        """Return exact factors of the smallest rank, with magnitude and row scale where the form has them.

        Raises UnsupportedError for a form that no LoRA expresses exactly.
        """
        form = self.form
        if self.dense or form.col_scale is not None or form.needs_pass:
            part = "this change" if self.dense else "a scale of the input columns"
            raise UnsupportedError(
                f"{self.module.name}: {part} has no exact LoRA form",
                hint="merge this adapter instead, or truncate it to a LoRA with --rank",
            )
        sides = self._kronecker_sides()
        if sides is not None:
            spectrum = kronecker_spectrum(*sides)
            up, down = spectrum.factors(spectrum.rank)
            return self._finish(up, down, "exact", False, self._relative_values(spectrum), None)
        plain = form.folded()
        left, s, right = core_svd(plain.up, plain.down)
        nonzero = numerical_rank(s)
        if nonzero == plain.rank:
            up, down = plain.up, plain.down
        else:
            root = s[:nonzero].sqrt()
            up, down = left[:, :nonzero] * root, root[:, None] * right[:nonzero]
        if self.scaled:  # these are not the singular values of dW
            s = s[:0]
        norm = torch.linalg.vector_norm(s)
        values = tuple(float(value / norm) if norm > 0 else 0.0 for value in s[:nonzero])
        return self._finish(up, down, "exact", self.scaled, values, None)

    def spectrum(self, target: int | float) -> Spectrum:
        """Compute at least the part of the spectrum that `want` needs: a rank (int) or an energy below 1 (float)."""
        sides = self._kronecker_sides()
        if sides is not None:
            return kronecker_spectrum(*sides, limit=target if isinstance(target, int) else None)
        if self.through_cores:
            plain = self.form.folded()
            up = plain.up
            if self.scaled:
                scale = self.delta.scale
                assert scale is not None
                up = scale[:, None] * up
            root = None if self.root is None else self.root.to(torch.float64)
            return low_rank_spectrum(up, plain.down, root)
        limit = min(self.form.shape)
        random = generator(self.module.name, self.device)
        total = self.delta.total if self.root is None else self._compute_weighted_total()
        width = min(target, limit) if isinstance(target, int) else min(FIRST_WIDTH, limit)
        while oversampled(width, limit) < DENSE_SHARE * limit:
            leading = randomised_spectrum(self.delta, total, width, random, self.root)
            if isinstance(target, int):
                return leading
            if leading.rank_for(target) is not None:
                return leading
            width *= 2
        return dense_spectrum(self.delta.dense(), None if self.root is None else self.root.to(torch.float64))

    def _kronecker_sides(self) -> tuple[Tensor, Tensor] | None:
        """Return both sides of a plain LoKr delta, float64, whose SVDs give that of dW; None for any other form."""
        if not isinstance(self.module, LokrModule) or self.scaled or self.root is not None:
            return None
        first, second = (
            torch.linalg.multi_dot(parts) if len(parts) > 1 else parts[0]
            for parts in ([part.to(self.device) for part in side] for side in self.module.sides(read_tensor))
        )
        return first * self.module.scale, second

    @staticmethod
    def _relative_values(spectrum: Spectrum) -> tuple[float, ...]:
        """Return the singular values relative to the Frobenius norm."""
        norm = spectrum.total**0.5
        return tuple(float(value) ** 0.5 / norm if norm > 0 else 0.0 for value in spectrum.squares)

    def _compute_weighted_total(self) -> float:
        """Return ||dW S||_F^2."""
        assert self.root is not None
        return sum(float((rows @ self.root).square().sum()) for _, _, rows in self.delta.delta_blocks(torch.float32))

    def truncated(self, spectrum: Spectrum, rank: int) -> Factored:
        """Return the factors of that rank, with measured errors.

        Raises UnsupportedError for a form with column scales whose scale is to be kept.
        """
        if self.keep_scale and (self.form.col_scale is not None or self.form.needs_pass):
            raise UnsupportedError(
                f"{self.module.name}: a scale of the input columns cannot be kept beside truncated factors",
                expected="a scale of the output rows, or none",
                hint="leave --scale exact out: the scale is then truncated with the factors",
            )
        rank = min(rank, spectrum.rank)
        up, down = (part.to(self.device, torch.float64) for part in spectrum.factors(rank))
        route = "cores" if self.through_cores else ("dense" if spectrum.full else "randomised")
        values = self._relative_values(spectrum)
        top = None
        if self.through_cores and self.scaled:
            scale = self.delta.scale
            assert scale is not None
            floor = SMALLEST_SCALE * scale.abs().max()
            up = torch.where(scale.abs() > floor, 1 / scale, torch.zeros_like(scale))[:, None] * up
            values = ()
        elif self.root is None and self.scaled:
            top = float(spectrum.squares[0]) ** 0.5
        return self._finish(up, down, route, self.keep_scale and self.scaled, values, top)

    def with_unit_scale(self, factored: Factored) -> Factored:
        """Add magnitudes with row scale 1 to factors that have none, for a folder where other weights have a row scale.

        Where a magnitude is missing, PEFT's DoRA would use the norms of W0 instead.
        """
        assert self.weight is not None
        dim = 0 if self.module.embedding else 1
        weight = self.weight.oriented_weight().to(device=self.device, dtype=torch.float64)
        after = torch.addmm(weight, factored.up.to(weight), factored.down.to(weight))
        magnitude = torch.linalg.vector_norm(after, dim=dim).to("cpu", torch.float32)
        return replace(factored, magnitude=magnitude, row_scale=None if dim == 0 else torch.ones(after.shape[0]))

    def _finish(
        self,
        up: Tensor,  # (out, R) float64
        down: Tensor,  # (R, in) float64
        route: str,
        with_scale: bool,
        values: tuple[float, ...],  # singular values of dW relative to its Frobenius norm
        top: float | None,  # ||dW||_2 where it is known
    ) -> Factored:
        """Round the factors to float32, compute their scales, and measure their errors."""
        up, down = up.to(torch.float32).contiguous(), down.to(torch.float32).contiguous()
        magnitude = row_scale = None
        if with_scale:
            magnitude, row_scale = self._compute_scales(up, down, route == "exact")
        relative_delta: float | None = None
        if self.scaled or self.in_memory or (self.form.residual is not None and self.weight is not None):
            measured = measure(self.module.name, self.delta, up, down, row_scale, top, self.root)
            errors = measured.relative_error, measured.spectral_error, measured.output_error
            relative_delta = measured.relative_delta
        else:
            plain = self.form.folded()
            root = None if self.root is None else self.root.to(torch.float64)
            errors = low_rank_errors(plain.up, plain.down, up, down, root)
        figures = LayerFigures(
            shape=self.form.shape,
            rank=down.shape[0],
            route=route,
            relative_error=errors[0],
            spectral_error=errors[1],
            energy=1 - errors[0] ** 2,
            relative_delta=relative_delta,
            output_error=errors[2],
            singular_values=values[:SPECTRUM_LENGTH],
        )
        return Factored(
            self.module.name,
            up.cpu(),
            down.cpu(),
            None if magnitude is None else magnitude.to("cpu", torch.float32),
            None if row_scale is None else row_scale.to("cpu", torch.float32),
            figures,
        )

    def _compute_scales(
        self,
        up: Tensor,  # (out, R) float32
        down: Tensor,  # (R, in) float32
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return magnitude and row_scale, (out,) float64 each, for the factors as they are written.

        Exact factors keep the magnitude, from which PEFT computes the same scale; truncated ones keep the scale.
        """
        form: CanonicalForm = replace(self.form, residual=None)
        wide_up, wide_down = up.to(torch.float64), down.to(torch.float64)
        norm = torch.cat(
            [
                torch.linalg.vector_norm(torch.addmm(block, wide_up[start : start + len(block)], wide_down), dim=1)
                for start, block in self.delta.rows.blocks(torch.float64)
            ]
        )
        safe = torch.where(norm == 0, torch.ones_like(norm), norm)
        if exact and form.magnitude is not None:
            return form.magnitude, form.magnitude / safe
        scale = self.delta.scale
        assert scale is not None
        return scale * norm, scale
