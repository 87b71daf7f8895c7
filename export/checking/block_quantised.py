"""Block-quantised matrices of an export (com.microsoft MatMulNBits), and the check of their codes.

A weight w of a block with scale s and zero point z is stored as the code q nearest to w / s + z; q is dequantised to
(q - z) s. The quantiser may choose any scale, but each code must be the nearest one for its scale. The check therefore
detects codes of other weights, even where those weights are within one step of the trained ones.

Source: onnxruntime's ContribOperators.md, MatMulNBits: B (N, blocks, block_size * bits / 8), low bits first; scales (N,
blocks); zero points packed like codes, or none for 2^(bits - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATOR = "MatMulNBits"
ENDINGS = ("_Q4", "_Q8")  # the quantiser appends one of these to the name of a product
NOISE = 1e-3  # steps by which the quantiser's float32 arithmetic may move a weight
BEYOND = 1.0  # steps by which a weight may exceed the last code: symmetric codes have one fewer above 0 than below


@dataclass(frozen=True, eq=False)
class QuantisedRows:
    """Rows of a quantised matrix."""

    codes: Tensor  # (n, k) float64: q - z
    scale: Tensor  # (n, k) float64
    lowest: Tensor  # (n, k) float64: the smallest q - z of the format; the largest is lowest + steps
    steps: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, k)."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def __getitem__(self, rows: slice) -> QuantisedRows:
        return QuantisedRows(self.codes[rows], self.scale[rows], self.lowest[rows], self.steps)

    def excess(self, exact: Tensor) -> Tensor:
        """Return by how much each weight of `exact` (n, k) is off beyond the rounding to its nearest code, (n, k).

        The result is 0 everywhere for codes that were made from these weights with these scales.
        """
        step = self.scale.abs()
        place = torch.where(self.scale != 0, exact / self.scale.where(self.scale != 0, torch.ones_like(step)), 0.0)
        off = place - self.codes
        at_low = (self.codes == self.lowest) & (off < 0)
        at_high = (self.codes == self.lowest + self.steps) & (off > 0)
        allowed = torch.where(at_low | at_high, BEYOND, 0.5) + NOISE
        return torch.where(self.scale != 0, (off.abs() - allowed).clamp_min(0) * step, exact.abs())


def is_quantised(node: ir.Node) -> bool:
    """Return True for a product with a quantised matrix."""
    return bool(node.op_type == OPERATOR)


def unquantised_name(name: str) -> str:
    """Return the name that the model builder gave a product before it was quantised."""
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def read_quantised_rows(node: ir.Node, read: Callable[[str], Tensor]) -> QuantisedRows | None:
    """Return the matrix of a quantised product; None where it is not stored, or not in 4 or 8 bits.

    read: returns the initialiser of a name in its own dtype.
    """
    sizes = {key: node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size") if key in node.attributes}
    names = [value.name if value is not None and value.const_value is not None else None for value in node.inputs[1:5]]
    names += [None] * (4 - len(names))
    if len(sizes) < 4 or names[0] is None or names[1] is None or names[3] is not None or sizes["bits"] not in (4, 8):
        return None
    width, height, bits, block = (sizes[key] for key in ("K", "N", "bits", "block_size"))
    blocks = math.ceil(width / block)
    codes = _unpack(read(names[0]).reshape(height, blocks, -1), bits).reshape(height, -1)[:, :width]
    scale = read(names[1]).to(torch.float64).reshape(height, blocks)
    zero = torch.full((height, blocks), 2.0 ** (bits - 1), dtype=torch.float64)
    if names[2] is not None:
        zero = _unpack(read(names[2]).reshape(height, -1), bits)[:, :blocks]
    scale, zero = (value.repeat_interleave(block, 1)[:, :width] for value in (scale, zero))
    return QuantisedRows(codes - zero, scale, -zero, 2**bits - 1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return codes as float64, the low bits of a byte before its high ones."""
    whole = packed.to(torch.float64)
    if bits == 8:
        return whole
    high = torch.floor(whole / 16)
    return torch.stack((whole - 16 * high, high), -1).flatten(-2)
