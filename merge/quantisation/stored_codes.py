"""Codes of four and eight bits: decoding of stored bytes to values, and encoding of values to codes.

Each function reads or writes the layout of a library's packing function, which its docstring names. Scales are applied
elsewhere.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .rounding import round_to_table

if TYPE_CHECKING:
    from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 .. 7; bit 3 is the sign
E2M1_LARGEST = 6.0
E4M3_LARGEST = 448.0
E8M0_BIAS = 127
_BITS_OF_2_TO_MINUS_127 = 0x00400000  # a subnormal float32; other powers of two have a zero mantissa

assert sys.byteorder == "little", "safetensors is little-endian, and the codes are read as bytes"


def as_bytes(stored: Tensor) -> Tensor:
    """Return the bytes of `stored` (..., n) in the order of its elements, uint8 (..., n * item size)."""
    flat = stored.contiguous().view(-1).view(torch.uint8)  # a view of (n, 1) can have any last stride
    return flat.view(*stored.shape[:-1], -1) if stored.ndim else flat


@cache
def _e4m3_table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def decode_e4m3(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of `stored` (float8_e4m3fn, any shape) in `dtype`, without rounding.

    On a CPU a table is used: it is four times faster than the cast of torch 2.13.
    """
    if stored.device.type != "cpu":
        return stored.to(dtype)
    codes = as_bytes(stored).view(-1).int()
    return _e4m3_table(dtype).index_select(0, codes).view(stored.shape)


@cache
def _e4m3_values() -> Tensor:
    """Return the 253 finite values of E4M3, sorted, float32."""
    codes = torch.cat((torch.arange(0xFE, 0x80, -1), torch.arange(0x00, 0x7F)))  # -448 .. -2^-9, 0 .. 448
    return _e4m3_table(torch.float32)[codes]


def encode_e4m3(values: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Return `values` as float8_e4m3fn: nearest, ties to even, or stochastic with `uniform` (rounding.py).

    Values beyond +-448 become +-448.
    """
    values = values.clamp(-E4M3_LARGEST, E4M3_LARGEST)
    if uniform is not None:
        table = _e4m3_values()
        values = table[round_to_table(values, table, uniform)]
    return values.to(torch.float8_e4m3fn)


def low_nibbles_first(packed: Tensor) -> Tensor:
    """Return int8 codes 0 .. 15 of `packed` (uint8, (..., n)), shape (..., 2 n): low nibble, then high nibble."""
    wide = packed.to(torch.int16)
    wide |= wide << 4
    wide &= 0x0F0F
    return wide.view(torch.int8)


def pack_low_first(codes: Tensor) -> Tensor:
    """Return the inverse of `low_nibbles_first`: `codes` (..., 2 n) of 0 .. 15 as uint8 (..., n)."""
    return codes[..., 0::2].to(torch.uint8) | (codes[..., 1::2].to(torch.uint8) << 4)


@cache
def pair_table(values: tuple[float, ...], dtype: torch.dtype, high_first: bool) -> Tensor:
    """Return (256, 2) `values` of the two nibbles of each byte, in `dtype`."""
    table = torch.tensor(values, dtype=torch.float32).to(dtype)
    high, low = table.repeat_interleave(16), table.repeat(16)
    return torch.stack((high, low) if high_first else (low, high), dim=-1).contiguous()


def decode_pairs(packed: Tensor, values: tuple[float, ...], dtype: torch.dtype, *, high_first: bool) -> Tensor:
    """Return the `values` of both nibbles of each byte of `packed` (uint8, (..., n)) in `dtype`, (..., 2 n)."""
    table = pair_table(values, dtype, high_first).to(packed.device)
    pairs = table.view(torch.float64 if dtype.itemsize == 4 else torch.int32).view(-1)  # a pair is one element
    found = pairs.index_select(0, packed.contiguous().view(-1).int())
    return found.view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


E2M1_SIGNED = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))


def encode_e2m1(values: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Return the uint8 codes 0 .. 15 of the nearest E2M1 values, ties to the even mantissa.

    With `uniform` values are rounded stochastically (rounding.py). Values beyond +-6 become +-6. The thresholds are
    those of compressed_tensors/quantization/utils/fp4_utils.py, cast_to_fp4. Zero always gets the code 0, also where
    a negative value was rounded to it.
    """
    if uniform is not None:
        table = torch.tensor(sorted(set(E2M1_SIGNED)))
        values = table[round_to_table(values, table, uniform)]
    size = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for threshold, strict in ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False)):
        codes += size > threshold if strict else size >= threshold
    codes += size > 5.0
    return codes | (((values < 0) & (codes > 0)).to(torch.uint8) << 3)


def decode_e8m0(stored: Tensor) -> Tensor:
    """Return 2^(code - 127) of `stored` (bytes of any dtype) as float32; the code 255 gives infinity."""
    codes = as_bytes(stored).int()
    return torch.where(codes == 0, _BITS_OF_2_TO_MINUS_127, codes << 23).view(torch.float32)


def as_e8m0(codes: Tensor, ref: TensorRef) -> Tensor:
    """Return E8M0 `codes` (0 .. 254) in the dtype (U8 or F8_E8M0) and shape of the stored tensor `ref`."""
    return codes.to(torch.uint8).view(TORCH_DTYPES[ref.dtype]).reshape(ref.shape)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return `codes` (rows, n), 0 .. 2^bits - 1, as int32 (rows, ceil(n bits / 32)), the first code in the low bits.

    4 and 8 bits only; the inverse is `unpack_words`. The last word is padded with zeros, as in compressed_tensors/
    compressors/pack_quantized/helpers.py, pack_to_int32.
    """
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per_word))
    packed = pack_low_first(padded) if bits == 4 else padded
    return packed.contiguous().view(-1).view(torch.int32).view(packed.shape[0], -1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of each row of `words` (int32, (rows, n)): int8 for 4 bits, uint8 for 8 bits."""
    stored = as_bytes(words)
    return (low_nibbles_first(stored) if bits == 4 else stored)[..., :count]
