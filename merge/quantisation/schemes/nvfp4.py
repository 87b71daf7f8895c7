"""NVFP4: E2M1 codes, one E4M3 scale for 16 values of a row, and one float32 scale for the weight.

    compressed-tensors  weight_packed U8 (out, in / 2), low nibble first; weight_scale F8_E4M3 (out, in / 16);
                        weight_global_scale F32 (1,), a divisor
    ModelOpt            weight U8, weight_scale, weight_scale_2 F32, a factor

Arithmetic: compressed-tensors 0.20, compressors/nvfp4/base.py, decompress: scale / global scale and the product with
the code in float32, rounded once to bfloat16. ModelOpt 0.47, torch/quantization/qtensor/nvfp4_tensor.py, dequantize:
scale * scale_2 and the product in float32, rounded once to the model's dtype, here bfloat16. GPU kernels apply the
scales to the accumulated products and do not round the dequantised weight.
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
    """Weight (out, in). Parts: "packed", "scale" and "global_scale", a divisor where `divides`, else a factor."""

    grid: ScaleGrid
    divides: bool

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        packed = read_part_rows(read, self.parts["packed"], first, count)
        values = decode_pairs(packed, E2M1_SIGNED, torch.float32, high_first=False)
        scale = decode_e4m3(read_part_rows(read, self.parts["scale"], first, count), torch.float32)
        self.grid.apply(values, self._with_global(scale, read), "mul_")
        return values.to(torch.bfloat16)

    def candidates(self, weight: Tensor, read: Read, uniform: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored scales, then new scales (largest value of the group / 6) with their codes.

        The global scale is kept, because weights that a loader fuses into one layer must have the same one.
        """
        stored = decode_e4m3(read_part(read, self.parts["scale"]), torch.float32)
        yield {"packed": self._encoded(weight, self._with_global(stored, read), uniform)}
        wanted = self.grid.block_maxima(weight.abs()) / E2M1_LARGEST
        unit = self._with_global(torch.ones(1), read)
        codes = encode_e4m3(wanted / unit)
        scale = decode_e4m3(codes, torch.float32)
        yield {"packed": self._encoded(weight, self._with_global(scale, read), uniform), "scale": codes}

    def _with_global(self, scale: Tensor, read: Read) -> Tensor:
        overall = read_part(read, self.parts["global_scale"]).reshape(1)
        return scale / overall if self.divides else scale * overall

    def _encoded(self, weight: Tensor, scale: Tensor, uniform: Tensor | None) -> Tensor:
        values = weight.clone()
        self.grid.apply(values, scale, "div_")
        return pack_low_first(encode_e2m1(values.nan_to_num_(nan=0.0), uniform))
