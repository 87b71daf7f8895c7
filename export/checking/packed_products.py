"""The quantised matrices of an export (com.microsoft MatMulNBits), and whether their codes are those of given weights.

A weight w of a block with scale s and zero point z is stored as the code q nearest to w / s + z, which stands for
(q - z) s. Which scales are best is the quantiser's choice; that each code is the nearest one for its scale is not. So
codes of other weights are found, though they too lie within a step of the trained ones.

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
ENDINGS = ("_Q4", "_Q8")  # what the quantiser adds to a product's name
NOISE = 1e-3  # of a step: what float32 arithmetic moves a weight between two codes
BEYOND = 1.0  # steps by which a weight may lie past the last code: symmetric codes have one less above than below


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of a quantised matrix."""

    codes: Tensor  # (n, k) float64: q - z
    scale: Tensor  # (n, k) float64
    lowest: Tensor  # (n, k) float64: the least q - z there is; the largest is `steps` more
    steps: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, k)."""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def __getitem__(self, rows: slice) -> PackedRows:
        return PackedRows(self.codes[rows], self.scale[rows], self.lowest[rows], self.steps)

    def excess(self, exact: Tensor) -> Tensor:
        """Return by how much each weight of `exact` (n, k) is off beyond its nearest code, in the weight's own unit.

        Zero everywhere for codes that were made of these weights with these scales.
        """
        step = self.scale.abs()
        place = torch.where(self.scale != 0, exact / self.scale.where(self.scale != 0, torch.ones_like(step)), 0.0)
        off = place - self.codes
        at_low = (self.codes == self.lowest) & (off < 0)
        at_high = (self.codes == self.lowest + self.steps) & (off > 0)
        allowed = torch.where(at_low | at_high, BEYOND, 0.5) + NOISE
        return torch.where(self.scale != 0, (off.abs() - allowed).clamp_min(0) * step, exact.abs())


def is_packed(node: ir.Node) -> bool:
    """Return True for a product with a quantised matrix."""
    return bool(node.op_type == OPERATOR)


def product_name(name: str) -> str:
    """Return the name that the model builder gave a product before it was quantised."""
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def read_packed(node: ir.Node, read: Callable[[str], Tensor]) -> PackedRows | None:
    """Return the matrix of a quantised product; None where its inputs are not stored, or of another form."""
    sizes = {key: node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size") if key in node.attributes}
    held = [value.name if value is not None and value.const_value is not None else None for value in node.inputs[1:5]]
    held += [None] * (4 - len(held))
    if len(sizes) < 4 or held[0] is None or held[1] is None or held[3] is not None or sizes["bits"] not in (4, 8):
        return None
    width, height, bits, block = (sizes[key] for key in ("K", "N", "bits", "block_size"))
    blocks = math.ceil(width / block)
    codes = _unpack(read(held[0]).reshape(height, blocks, -1), bits).reshape(height, -1)[:, :width]
    scale = read(held[1]).to(torch.float64).reshape(height, blocks)
    zero = torch.full((height, blocks), 2.0 ** (bits - 1), dtype=torch.float64)
    if held[2] is not None:
        zero = _unpack(read(held[2]).reshape(height, -1), bits)[:, :blocks]
    scale, zero = (value.repeat_interleave(block, 1)[:, :width] for value in (scale, zero))
    return PackedRows(codes - zero, scale, -zero, 2**bits - 1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return codes as float64, the low bits of a byte before its high ones."""
    whole = packed.to(torch.float64)
    if bits == 8:
        return whole
    high = torch.floor(whole / 16)
    return torch.stack((whole - 16 * high, high), -1).flatten(-2)
