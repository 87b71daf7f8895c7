"""MXFP4: E2M1 codes, with one power of two (E8M0) as the scale of 32 values.

    gpt-oss             *_blocks U8 (experts, out, in / 32, 16), low nibble first; *_scales U8 (experts, out, in / 32).
                        The dense parameter is (experts, in, out), the transpose.
    compressed-tensors  weight_packed U8 (out, in / 2); weight_scale U8 or F8_E8M0 (out, in / 32)

Arithmetic: transformers 5.24, integrations/mxfp4.py, _convert_moe_packed_tensors, and compressed-tensors 0.20,
compressors/mxfp4/base.py, decompress: code times 2^(scale - 127) in bfloat16, which is exact within bfloat16's range.
Both dequantise to the dtype of the model; bfloat16 is that of gpt-oss, and float32 gives the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part, read_part_rows
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.stored_codes import (
    E2M1_SIGNED,
    E8M0_BIAS,
    as_bytes,
    as_e8m0,
    decode_e8m0,
    decode_pairs,
    encode_e2m1,
    pack_low_first,
)
from adapter_merge.quantisation.transposed_cache import TransposedCache
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2^2
LARGEST_MANTISSA = 1.75  # a group whose largest value has this mantissa or more gets the next power of two


@dataclass(frozen=True)
class Mxfp4Weight(PackedWeight):
    """Weight (out, in); or, where `transposed`, a stack (experts, in, out) that is stored as (experts, out, in).

    Parts: "packed" and "scale". `grid` describes the stored orientation.
    """

    grid: ScaleGrid
    transposed: bool = False
    cache: TransposedCache = field(default_factory=TransposedCache, repr=False, compare=False)

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        if not self.transposed:
            packed = read_part_rows(read, _matrix(self.parts["packed"], self.shape), first, count)
            scale = read_part_rows(read, _matrix(self.parts["scale"], self.shape), first, count)
            return self._decoded(packed, scale).to(torch.bfloat16)
        pieces = []
        while count:
            expert, start = divmod(first, self.shape[-2])
            taken = min(count, self.shape[-2] - start)
            pieces.append(self._columns(read, expert, start, taken))
            first, count = first + taken, count - taken
        return torch.cat(pieces) if pieces else torch.empty(0, self.shape[-1], dtype=torch.bfloat16)

    def candidates(self, weight: Tensor, read: Read, uniform: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored scales, then new scales with their codes.

        A new scale is 2^(floor(log2(largest / 1.75)) - 1), where `largest` is the largest absolute value of the group
        (compressed-tensors 0.20, quantization/utils/mxfp_utils.py, generate_mx_scales). In units of the scale the
        largest value is 3.5 .. 7; values above 6 become 6.
        """
        stored = weight.transpose(-1, -2) if self.transposed else weight
        uniform = uniform.transpose(-1, -2) if uniform is not None and self.transposed else uniform
        kept = as_bytes(read_part(read, self.parts["scale"])).reshape(*stored.shape[:-2], *self.grid.cells)
        yield {"packed": self._encoded(stored, kept, uniform)}
        largest = self.grid.block_maxima(stored.abs())
        exponent = torch.frexp(largest / LARGEST_MANTISSA).exponent - 1 - (LARGEST_EXPONENT - 1) + E8M0_BIAS
        codes = torch.where(largest > 0, exponent.clamp(0, 254), kept.int()).to(torch.uint8)
        yield {"packed": self._encoded(stored, codes, uniform), "scale": as_e8m0(codes, self.parts["scale"])}

    def uncached(self) -> Mxfp4Weight:
        return replace(self, cache=TransposedCache())

    def _columns(self, read: Read, expert: int, start: int, taken: int) -> Tensor:
        """Return columns start .. start + taken of a stored expert as rows, bfloat16 (taken, out)."""
        outputs, group, stop = self.shape[-1], start // GROUP, -(-(start + taken) // GROUP)

        def turn() -> tuple[Tensor, ...]:
            shape = (self.shape[0] * outputs, self.shape[-2])
            packed = read_part_rows(read, _matrix(self.parts["packed"], shape), expert * outputs, outputs)
            scale = read_part_rows(read, _matrix(self.parts["scale"], shape), expert * outputs, outputs)
            blocks = packed.view(outputs, -1, GROUP // 2).transpose(0, 1).contiguous()  # (in / 32, out, 16)
            return blocks, scale.T.contiguous()

        blocks, scales = self.cache.get((self.name, expert), turn)
        packed, scale = blocks[group:stop].flatten(0, 1), scales[group:stop].reshape(-1, 1)
        values = decode_pairs(packed, E2M1_SIGNED, torch.float32, high_first=False) * decode_e8m0(scale)
        columns = values.view(stop - group, outputs, GROUP).transpose(1, 2).flatten(0, 1)
        offset = start - group * GROUP
        return columns[offset : offset + taken].to(torch.bfloat16)

    def _decoded(self, packed: Tensor, scale: Tensor) -> Tensor:
        values = decode_pairs(packed, E2M1_SIGNED, torch.float32, high_first=False)
        self.grid.apply(values, decode_e8m0(scale), "mul_")
        return values

    def _encoded(self, stored: Tensor, codes: Tensor, uniform: Tensor | None) -> Tensor:
        scaled = stored / self.grid.expand(decode_e8m0(codes))
        return pack_low_first(encode_e2m1(scaled.nan_to_num_(nan=0.0), uniform)).reshape(self.parts["packed"].shape)


def _matrix(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """Return `ref` as a matrix with one row for each row of `shape`."""
    rows = math.prod(shape[:-1])
    return replace(ref, shape=(rows, math.prod(ref.shape) // rows if rows else 0))


def find_mxfp4(findings: Findings) -> None:
    """Add every stack of experts of a gpt-oss checkpoint to `findings`."""
    cache = TransposedCache()
    for name, blocks in findings.tensors.items():
        if not name.endswith("_blocks"):
            continue
        dense = name.removesuffix("_blocks")
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or not all(blocks.shape) or blocks.shape[3] != GROUP // 2:
            findings.add_fault(name, "is not a stack of MXFP4 blocks", f"U8 [experts, out, groups, {GROUP // 2}]",
                           f"{blocks.dtype} {list(blocks.shape)}")  # fmt: skip
            continue
        experts, rows, groups, _ = blocks.shape
        scales = findings.find_part(f"{dense}_scales", ("U8", "F8_E8M0"), [(experts, rows, groups)], owner=dense)
        if scales is not None:
            grid = ScaleGrid((experts, rows, groups * GROUP), (1, GROUP))
            findings.add_weight(Mxfp4Weight(dense, "mxfp4", (experts, groups * GROUP, rows),
                                     {"packed": blocks, "scale": scales}, "BF16", grid, True, cache))  # fmt: skip
