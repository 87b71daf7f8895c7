"""The delta dW = W' - W0 of one weight as a linear map: products with dW, computed while W0 is read in blocks.

    dW = diag(d - 1) W0 + diag(d) up down           (DoRA, DuDe; d the row scale)

Thus dW X = (d - 1) * (W0 X) + d * (up (down X)) needs only W0 and thin matrices, and no difference of large matrices.
A delta with a rounded residual (DuDe on a bfloat16 base) is not such a sum, and is computed block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundModule
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_into

RESIDENT_BYTES = 256 << 20  # of float32; smaller weights stay on the device between passes
BLOCK_BYTES = 8 << 20  # of float32


class BaseRows:
    """Rows of W0 (out, in) in blocks: from memory for a small weight, from the file for a large one."""

    def __init__(
        self,
        weight: BoundModule,
        device: torch.device,
        resident_bytes: int | None = None,
    ) -> None:
        self.weight, self.device = weight, device
        self.shape = weight.module.shape
        out, inner = self.shape
        self._whole: Tensor | None = None
        limit = RESIDENT_BYTES if resident_bytes is None else resident_bytes
        if weight.transposed or weight.rows is not None or 4 * out * inner <= limit:
            self._whole = weight.oriented_weight().to(device=device, dtype=torch.float32)

    @property
    def resident(self) -> bool:
        """True when the whole weight is kept in memory."""
        return self._whole is not None

    def blocks(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, rows start .. start+n of W0 as (n, in)) in order.

        A block is valid until the next one is requested. The caller must not write to it.
        """
        out, inner = self.shape
        step = max(1, BLOCK_BYTES // (4 * inner))
        if self._whole is not None:
            for start in range(0, out, step):
                yield start, self._whole[start : start + step].to(dtype)
            return
        ref = self.weight.weight
        stored = TORCH_DTYPES[ref.dtype]
        pin = self.device.type == "cuda"
        buffer = torch.empty(step * inner * stored.itemsize, dtype=torch.uint8, pin_memory=pin)
        for start in range(0, out, step):
            raw = buffer[: min(step, out - start) * inner * stored.itemsize]
            read_into(ref, start * inner * stored.itemsize, raw)
            yield start, raw.view(stored).view(-1, inner).to(device=self.device, dtype=dtype)


class DeltaOperator:
    """dW of a canonical form as a linear map, with products in float32.

    The constructor reads W0 once, or twice for column norms, to compute d and ||dW||_F in float64.
    """

    def __init__(
        self,
        form: CanonicalForm,  # float64, on the rows' device
        rows: BaseRows,
    ) -> None:
        self.form, self.rows = form, rows
        self.shape = form.shape
        if form.needs_pass:
            squares = torch.zeros(self.shape[1], dtype=torch.float64, device=rows.device)
            for start, block in rows.blocks(torch.float64):
                squares += form.pass_sums(block.clone(), start)
            self.form = form = form.with_pass_sums(squares)
        rounded = form.residual is not None and form.residual.is_rounded
        self._structured = not rounded and form.col_scale is None
        self.scale: Tensor | None = None  # (out,) float64: d
        if self._structured:
            self._measure_structured()
        else:
            self._measure_by_blocks()

    def _measure_structured(self) -> None:
        """Compute d, ||dW||_F^2 and ||W0||_F^2 from W0 down^T (out, R), without computing dW."""
        folded = self.form.folded()
        up, down = folded.up, folded.down
        gram = down @ down.T  # (R, R)
        quadratic = ((up @ gram) * up).sum(1)  # (out,): squared row norms of up @ down
        parts = [
            (block.square().sum(1), ((block @ down.T) * up[start : start + block.shape[0]]).sum(1))
            for start, block in self.rows.blocks(torch.float64)
        ]
        squares = torch.cat([part[0] for part in parts])  # (out,): squared row norms of W0
        inner = torch.cat([part[1] for part in parts])  # (out,): <W0, up @ down> by rows
        scale = folded.row_scale
        if folded.magnitude is not None:
            norm = (squares + 2 * inner + quadratic).clamp_min(0).sqrt()
            scale = torch.where(norm == 0, torch.ones_like(norm), folded.magnitude / norm)
        self.scale = scale
        shift = torch.zeros_like(squares) if scale is None else scale - 1
        times = torch.ones_like(squares) if scale is None else scale
        energy = shift.square() * squares + 2 * shift * times * inner + times.square() * quadratic
        self.total = float(energy.clamp_min(0).sum())
        self.base_total = float(squares.sum())
        self._shift = shift[:, None].to(torch.float32)
        self._up = (times[:, None] * up).to(torch.float32)
        self._down = down.to(torch.float32)

    def _measure_by_blocks(self) -> None:
        """Compute d, ||dW||_F^2 and ||W0||_F^2 from blocks of dW."""
        self.total = self.base_total = 0.0
        scales = []
        for start, block in self.rows.blocks(torch.float64):
            self.base_total += float(block.square().sum())
            after = block.clone()
            scale = self.form.apply_(after, start)
            if scale is not None:
                scales.append(scale)
            self.total += float(after.sub_(block).square().sum())
        self.scale = torch.cat(scales) if scales else None
        self._single = self.form.to(dtype=torch.float32)

    def delta_blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (start, rows of W0, the same rows of dW), both (n, in) in `dtype`."""
        form = self.form if dtype == torch.float64 else self.form.to(dtype=dtype)
        for start, block in self.rows.blocks(dtype):
            yield start, block, form.delta_rows(block, start)

    def dense(self) -> Tensor:
        """Return dW (out, in), float64, for a decomposition that needs most of the spectrum."""
        return torch.cat([delta for _, _, delta in self.delta_blocks()])

    def matmul(self, x: Tensor) -> Tensor:
        """Compute dW @ x: x (in, l) float32 -> (out, l)."""
        if self._structured:
            product = torch.cat([block @ x for _, block in self.rows.blocks()])
            return torch.addmm(product.mul_(self._shift), self._up, self._down @ x)
        return torch.cat([self._single.delta_rows(block, start) @ x for start, block in self.rows.blocks()])

    def rmatmul(self, y: Tensor) -> Tensor:
        """Compute dW^T @ y: y (out, l) float32 -> (in, l)."""
        if self._structured:
            product = self._down.T @ (self._up.T @ y)
            shifted = self._shift * y
            for start, block in self.rows.blocks():
                product.addmm_(block.T, shifted[start : start + block.shape[0]])
            return product
        product = torch.zeros(self.shape[1], y.shape[1], dtype=y.dtype, device=y.device)
        for start, block in self.rows.blocks():
            product.addmm_(self._single.delta_rows(block, start).T, y[start : start + block.shape[0]])
        return product


class DenseDelta:
    """A dense dW in memory as a linear map, for a combination that no factors describe."""

    def __init__(
        self,
        delta: Tensor,  # (out, in) float64, on the rows' device
        rows: BaseRows,
        scale: Tensor | None = None,  # (out,) float64, where the delta also has a form with a row scale
    ) -> None:
        self.delta, self.rows, self.scale = delta, rows, scale
        self.shape = (delta.shape[0], delta.shape[1])
        self.total = float(delta.square().sum())
        self.base_total = sum(float(block.square().sum()) for _, block in rows.blocks(torch.float64))
        self._single = delta.to(torch.float32)

    def delta_blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (start, rows of W0, the same rows of dW), both (n, in) in `dtype`."""
        for start, block in self.rows.blocks(dtype):
            yield start, block, self.delta[start : start + block.shape[0]].to(dtype)

    def dense(self) -> Tensor:
        """Return dW (out, in), float64."""
        return self.delta

    def matmul(self, x: Tensor) -> Tensor:
        """Compute dW @ x: x (in, l) float32 -> (out, l)."""
        return self._single @ x

    def rmatmul(self, y: Tensor) -> Tensor:
        """Compute dW^T @ y: y (out, l) float32 -> (in, l)."""
        return self._single.T @ y


AnyDelta = DeltaOperator | DenseDelta
