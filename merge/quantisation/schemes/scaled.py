"""FP8 (E4M3) and INT8 weights: one byte per element, with scales per tensor, row, group or block.

    FP8 block      DeepSeek's `weight` and `weight_scale_inv` (quant_method "fp8")
    FP8 row        fbgemm's and compressed-tensors' `weight` and `weight_scale` (out, 1)
    FP8 tensor     one scale (compressed-tensors, ModelOpt, transformers' static FP8)
    INT8           compressed-tensors' int-quantized `weight`, with or without `weight_zero_point`
    INT8 of bitsandbytes: `weight` and `SCB` (out,), the largest absolute value of each row

Arithmetic of the libraries:

- compressed-tensors 0.20, quantization/lifecycle/forward_helpers.py, _dequantize: code and zero point are cast to the
  scale's dtype, subtracted, multiplied, all in the scale's dtype (exact but for the one rounding of the product).
- transformers 5.24, integrations/finegrained_fp8.py, Fp8Dequantize._dequantize_one: product in float32, rounded once to
  the scale's dtype (bfloat16 for E8M0 scales), unless the model has another dtype. It computes the block size as
  rows // grid rows, which differs from the config's where a dimension is not a multiple of the block. Here blocks have
  the config's size and the last one is smaller, as in compressed-tensors' fp8block_dequantizer.py and in vLLM.
- fbgemm multiplies the product of activations and codes by float32 scales: W is code times scale in float32.
- bitsandbytes 0.50, _ops.py, int8_vectorwise_dequant: code * SCB, then * 7.874015718698502e-3, both in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part, read_part_rows
from adapter_merge.quantisation.rounding import round_to_integers
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.stored_codes import E4M3_LARGEST, as_e8m0, decode_e4m3, decode_e8m0, encode_e4m3
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

BYTE_SCALES = ("F8_E8M0", "U8")  # powers of two, 2^(code - 127)
BITSANDBYTES_SCALE = 7.874015718698502e-3  # 1 / 127 as int8_vectorwise_dequant rounds it
INT8_LOWEST, INT8_HIGHEST = -128, 127
STEP = 1 << 18  # elements that are encoded in one step, so that they fit into the processor's cache


@dataclass(frozen=True)
class ScaledWeight(PackedWeight):
    """Weight (code - zero point) * scale, with codes of one byte.

    Parts: "weight" F8_E4M3 or I8 of `shape`; "scale" with one element per block of `grid` (possibly a scalar);
    optionally "zero_point" I8 with the shape of the scale.
    """

    grid: ScaleGrid
    factor: float = 1.0  # applied after the scale

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        stored = read_part_rows(read, self.parts["weight"], first, count)
        fp8 = self.parts["weight"].dtype == "F8_E4M3"
        values = decode_e4m3(stored, torch.float32) if fp8 else stored.to(torch.float32)
        start, cells, index = self.grid.grid_rows(first, count)
        if "zero_point" in self.parts:
            self.grid.apply(values, self._cells(read, "zero_point", start, cells).float()[index], "sub_")
        self.grid.apply(values, self._cells(read, "scale", start, cells).float()[index], "mul_")
        if self.factor != 1.0:
            values *= self.factor
        return values.to(TORCH_DTYPES[self.dtype])

    def candidates(self, weight: Tensor, read: Read, uniform: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored scales, then new scales with their codes.

        A new scale is the largest absolute value of its block / 448 (FP8) or / 127 (INT8). Weights with zero points
        keep scales and zero points.
        """
        cells = (*self.shape[:-2], *self.grid.cells)
        stored = read_part(read, self.parts["scale"])
        kept = self._decoded("scale", stored).float().reshape(cells)
        zero = None
        if "zero_point" in self.parts:
            zero = read_part(read, self.parts["zero_point"]).float().reshape(cells)
        yield {"weight": self._encoded(weight, kept, zero, uniform)}
        if zero is not None:
            return
        largest = self.grid.block_maxima(weight.abs())
        limit = E4M3_LARGEST if self.parts["weight"].dtype == "F8_E4M3" else INT8_HIGHEST
        wanted = torch.where(largest > 0, largest / (limit * self.factor), kept)
        scale = _stored_scale(wanted, self.parts["scale"])
        yield {
            "weight": self._encoded(weight, self._decoded("scale", scale).float().reshape(cells), None, uniform),
            "scale": scale,
        }

    def _cells(self, read: Read, role: str, start: int, count: int) -> Tensor:
        """Return grid rows start .. start + count of the scales or zero points, (count, blocks per row)."""
        ref, across = self.parts[role], self.grid.cells[1]
        size = ref.nbytes // max(1, _elements(ref)) * across
        raw = read(ref, start * size, (start + count) * size)
        stored = raw if ref.dtype in BYTE_SCALES else raw.view(TORCH_DTYPES[ref.dtype])
        return self._decoded(role, stored).reshape(count, across)

    def _decoded(self, role: str, stored: Tensor) -> Tensor:
        return decode_e8m0(stored) if role == "scale" and self.parts[role].dtype in BYTE_SCALES else stored

    def _encoded(self, weight: Tensor, scale: Tensor, zero: Tensor | None, uniform: Tensor | None) -> Tensor:
        """Encode `weight` for scales and zero points (..., *grid.cells); zero where a scale is zero."""
        rows, across = weight.reshape(-1, self.shape[-1]), self.grid.cells[1]
        fp8 = self.parts["weight"].dtype == "F8_E4M3"
        codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
        scales = scale.reshape(-1, across) * self.factor
        step = max(1, STEP // max(1, rows.shape[1]))
        for first in range(0, rows.shape[0], step):
            values = rows[first : first + step].clone()
            part = None if uniform is None else uniform.reshape(rows.shape)[first : first + step]
            start, count, index = self.grid.grid_rows(first, values.shape[0])
            divisors = scales[start : start + count][index]
            self.grid.apply(values, divisors, "div_")
            if bool((divisors == 0).any()):
                values = torch.where(self._expand(divisors) == 0, torch.zeros(()), values)
            if fp8:
                codes[first : first + step] = encode_e4m3(values, part)
                continue
            if zero is not None:
                self.grid.apply(values, zero.reshape(-1, across)[start : start + count][index], "add_")
            codes[first : first + step] = round_to_integers(values, part).clamp_(INT8_LOWEST, INT8_HIGHEST)
        return codes.reshape(weight.shape)

    def _expand(self, cells: Tensor) -> Tensor:
        """Return `cells` (rows, blocks) repeated for every column of their blocks, (rows, in)."""
        return cells.repeat_interleave(self.grid.block[1], dim=1)[:, : self.shape[-1]]


def _elements(ref: TensorRef) -> int:
    count = 1
    for size in ref.shape:
        count *= size
    return count


def _stored_scale(wanted: Tensor, ref: TensorRef) -> Tensor:
    """Return scales `wanted` (float32) in the dtype and shape of `ref`; E8M0 scales are rounded up to powers of two."""
    if ref.dtype in BYTE_SCALES:
        codes = torch.ceil(torch.log2(wanted)) + 127
        return as_e8m0(codes.clamp(0, 254), ref)
    return wanted.to(TORCH_DTYPES[ref.dtype]).reshape(ref.shape)
