"""Random numbers computed from a key and a position: equal on every machine and device and with every torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

ALL_ONES = (1 << 64) - 1
BITS = 53  # of each number


def random_bits(key: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return (count,) int64 of 0 .. 2^53 - 1: elements first .. first + count of the sequence of `key` (64 bits).

    Element i is the output function of SplitMix64 (Steele, Lea and Flood 2014) of key + i * 0x9E3779B97F4A7C15.
    """
    value = torch.arange(first, first + count, dtype=torch.int64, device=device)
    value = value * _signed(0x9E3779B97F4A7C15) + _signed(key)
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    value = value ^ _shift_right(value, 31)
    return _shift_right(value, 64 - BITS)


def _signed(value: int) -> int:
    """Return the int64 with the low 64 bits of `value`."""
    value &= ALL_ONES
    return value - (1 << 64) if value >> 63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 values to the right as if they were unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
