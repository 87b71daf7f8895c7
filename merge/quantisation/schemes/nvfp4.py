"""NVFP4: E2M1 codes, an E4M3 scale per 16 values of a row, and one float32 scale per weight.

    compressed-tensors  weight_packed U8 (out, in / 2), low nibble first; weight_scale F8_E4M3 (out, in / 16);
                        weight_global_scale F32 (1,), a divisor
    ModelOpt            weight U8, weight_scale, weight_scale_2 F32, a factor

Arithmetic: compressed-tensors 0.20, compressors/nvfp4/base.py, decompress: scale / global scale and the product with
the code in float32, rounded once to bfloat16 (the global scale has one dimension; a scalar would make torch divide in
bfloat16). ModelOpt 0.47, torch/quantization/qtensor/nvfp4_tensor.py, dequantize: scale * scale_2 and the product in
float32, rounded once to the model's dtype, here bfloat16. Kernels multiply the scales into the accumulator and never
round the weight to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part, read_part_rows
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.stored_codes import (
    E2M1_LARGEST,
    E2M1_SIGNED,
    decode_e4m3,
    decode_pairs,
    encode_e2m1,
    encode_e4m3,
    pack_low_first,
)
from adapter_merge.storage.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16


@dataclass(frozen=True)
class Nvfp4Weight(PackedWeight):
    """Weight (out, in). Parts: "packed", "scale" and "global_scale"; the latter divides, or multiplies (ModelOpt)."""

    grid: ScaleGrid
    divides: bool

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        packed = read_part_rows(read, self.parts["packed"], first, count)
        values = decode_pairs(packed, E2M1_SIGNED, torch.float32, high_first=False)
        scale = decode_e4m3(read_part_rows(read, self.parts["scale"], first, count), torch.float32)
        self.grid.combine(values, self._with_global(scale, read), "mul_")
        return values.to(torch.bfloat16)

    def candidates(self, weight: Tensor, read: Read, draw: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored scales, then for scales of the largest value of each group over 6.

        The global scale stays: other weights of a fused layer share it.
        """
        stored = decode_e4m3(read_part(read, self.parts["scale"]), torch.float32)
        yield {"packed": self._encoded(weight, self._with_global(stored, read), draw)}
        wanted = self.grid.largest(weight.abs()) / E2M1_LARGEST
        unit = self._with_global(torch.ones(1), read)
        codes = encode_e4m3(wanted / unit)
        scale = decode_e4m3(codes, torch.float32)
        yield {"packed": self._encoded(weight, self._with_global(scale, read), draw), "scale": codes}

    def _with_global(self, scale: Tensor, read: Read) -> Tensor:
        overall = read_part(read, self.parts["global_scale"]).reshape(1)
        return scale / overall if self.divides else scale * overall

    def _encoded(self, weight: Tensor, scale: Tensor, draw: Tensor | None) -> Tensor:
        values = weight.clone()
        self.grid.combine(values, scale, "div_")
        return pack_low_first(encode_e2m1(values.nan_to_num_(nan=0.0), draw))
