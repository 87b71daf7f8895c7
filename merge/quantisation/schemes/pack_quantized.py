"""compressed-tensors' pack-quantized weights: integers of 4 or 8 bits in int32 words, offset binary.

    weight_packed      I32 (out, ceil(in bits / 32)): codes v + 2^(bits - 1), the first code in the lowest bits
    weight_scale       (out, groups), (out, 1) or (1,)
    weight_zero_point  I32 (ceil(out bits / 32), groups), packed along out; one I8 where the tensor has one scale
    weight_g_idx       I32 (in,): the group of each column (activation ordering); all -1 without activation ordering
    weight_shape       I64 (2,)

Arithmetic: compressed-tensors 0.20, compressors/pack_quantized/base.py, decompress, and quantization/lifecycle/
forward_helpers.py, _dequantize: (code - zero point) * scale, computed and rounded in the scale's dtype.
compressed-tensors 0.20 does not read weight_g_idx. Versions up to 0.12 (forward.py, _process_quantization) sort the
columns by group and use one scale for group_size columns; this is scale[:, g_idx] where every group has group_size
columns. Other weight_g_idx are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter_merge.errors import FileFormatError
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part, read_part_rows
from adapter_merge.quantisation.rounding import round_to_integers
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.stored_codes import pack_words, unpack_words
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.tensor_io import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackQuantizedWeight(PackedWeight):
    """Weight (out, in) of `bits` bits. Parts: "packed", "scale", optionally "zero_point" and "group_index"."""

    bits: int
    grid: ScaleGrid

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        columns, offset = self.shape[1], 1 << (self.bits - 1)
        codes = unpack_words(read_part_rows(read, self.parts["packed"], first, count), self.bits, columns)
        values = codes.to(torch.float32)  # exact products for 16-bit scales: rounded once, as in the library
        start, cells, index = self.grid.grid_rows(first, count)
        scale = self._scales(read, start, cells).float()[index]
        groups = self._column_groups(read)
        if "zero_point" not in self.parts:
            values -= offset
        else:
            zero = self._zero_points(read, start, cells).float()[index] + offset
            self._apply(values, zero, groups, "sub_")
        self._apply(values, scale, groups, "mul_")
        return values.to(TORCH_DTYPES[self.dtype])

    def candidates(self, weight: Tensor, read: Read, uniform: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored scales and zero points, then new scales and zero points with their codes.

        New scales follow compressed-tensors' quantization/utils/helpers.py, calculate_qparams.
        """
        rows, groups = self.shape[0], self._column_groups(read)
        start, cells, index = self.grid.grid_rows(0, rows)
        scale = self._scales(read, start, cells)
        zero = self._zero_points(read, start, cells) if "zero_point" in self.parts else None
        yield {"packed": self._encoded(weight, scale[index], None if zero is None else zero[index], groups, uniform)}
        if zero is None:
            largest = self._reduced(weight.abs(), groups)
            wanted = largest / ((1 << self.bits) - 1) * 2
        else:
            low, high = -self._reduced(-weight, groups).clamp(min=0), self._reduced(weight, groups).clamp(min=0)
            wanted = (high - low) / ((1 << self.bits) - 1)
        scale = torch.where(wanted > 0, wanted, scale.float()).to(scale.dtype)
        tensors = {"scale": scale.reshape(self.parts["scale"].shape)}
        if zero is not None:
            limit = 1 << (self.bits - 1)
            zero = (-limit - low / scale.float()).round().clamp(-limit, limit - 1).to(torch.int8)
            packed = self.parts["zero_point"].dtype == "I32"
            tensors["zero_point"] = (
                pack_words(zero.T.to(torch.int16) + limit, self.bits).T.contiguous() if packed else zero.reshape(1)
            )
        codes = self._encoded(weight, scale[index], None if zero is None else zero[index], groups, uniform)
        yield {"packed": codes, **tensors}

    def _reduced(self, weight: Tensor, groups: Tensor | None) -> Tensor:
        """Return the maximum of `weight` over each group, (out, groups)."""
        if groups is None:
            return self.grid.block_maxima(weight)
        largest = torch.full((self.shape[0], self.grid.cells[1]), -torch.inf)
        return largest.scatter_reduce_(1, groups.expand(self.shape[0], -1), weight, "amax")

    def _scales(self, read: Read, start: int, count: int) -> Tensor:
        """Return grid rows start .. start + count of the scales, (count, groups)."""
        ref, groups = self.parts["scale"], self.grid.cells[1]
        size = groups * TORCH_DTYPES[ref.dtype].itemsize
        return read(ref, start * size, (start + count) * size).view(TORCH_DTYPES[ref.dtype]).reshape(count, groups)

    def _zero_points(self, read: Read, start: int, count: int) -> Tensor:
        """Return grid rows start .. start + count of the zero points, int8 (count, groups), around zero."""
        ref, per_word = self.parts["zero_point"], 32 // self.bits
        if ref.dtype == "I8":  # of a scale per tensor
            return read_part(read, ref).reshape(count, 1)
        word = start // per_word
        words = read_part_rows(read, ref, word, (start + count - 1) // per_word - word + 1 if count else 0)
        codes = unpack_words(words.T, self.bits, words.shape[0] * per_word).T[start - word * per_word :][:count]
        return (codes.to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8)

    def _column_groups(self, read: Read) -> Tensor | None:
        """Return the group of each column, int64 (in,), or None without activation ordering. Raises FileFormatError."""
        if "group_index" not in self.parts:
            return None
        ref, groups, width = self.parts["group_index"], self.grid.cells[1], self.grid.block[1]
        index = read_part(read, ref).long()
        if bool((index == -1).all()):
            return None
        inside = bool(((index >= 0) & (index < groups)).all())
        if not inside or not bool((torch.bincount(index, minlength=groups) == width).all()):
            raise FileFormatError(
                f"{ref.file}: {ref.name} does not assign the same number of columns to every group",
                expected=f"{width} columns in each of {groups} groups, or -1 everywhere",
                got=f"groups {int(index.min())} .. {int(index.max())}",
            )
        return index

    def _apply(self, values: Tensor, cells: Tensor, groups: Tensor | None, operation: str) -> None:
        if groups is None:
            self.grid.apply(values, cells, operation)
        else:
            getattr(values, operation)(cells[:, groups])

    def _encoded(
        self, weight: Tensor, scale: Tensor, zero: Tensor | None, groups: Tensor | None, uniform: Tensor | None
    ) -> Tensor:
        values, limit = weight.clone(), 1 << (self.bits - 1)
        self._apply(values, scale.float(), groups, "div_")
        values.nan_to_num_(nan=0.0)  # 0 / 0, where a scale is zero
        if zero is not None:
            self._apply(values, zero.float(), groups, "add_")
        return pack_words(round_to_integers(values, uniform).clamp_(-limit, limit - 1).add_(limit), self.bits)
