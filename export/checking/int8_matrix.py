"""int8 weights of onnxruntime's dynamic quantiser, and the check that their codes are those of given weights.

A weight w is stored as the code q nearest to w / s + z; q is dequantised to (q - z) s. The quantiser computes s and z
from the weights: one pair per column for a product (int8, z = 0, s = max |w| / 127), one pair per matrix for an
embedding (uint8, s = (max(w, 0) - min(w, 0)) / 255). The check compares scales and codes with the weights, so that it
detects codes and scales that were made from other weights.

Source: onnxruntime/python/tools/quantization/quant_utils.py, compute_scale_zp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-3  # steps by which the quantiser's float32 arithmetic may move a weight
SCALE_NOISE = 1e-4  # relative; the quantiser computes the scale from float32 weights
ENDINGS = ("", "_Transposed")  # before _quantized, _scale and _zero_point in a matrix's names


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """A quantised matrix (rows, columns) of the graph."""

    codes: Tensor  # (rows, columns) float64
    scale: Tensor  # (columns,) or one value, float64
    zero: Tensor  # z, in the shape of `scale`
    symmetric: bool  # int8; else uint8
    transposed: bool = False  # this object is the transpose of the stored matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dequantised matrix."""
        return tuple(self.codes.T.shape if self.transposed else self.codes.shape)

    @property
    def T(self) -> Int8Matrix:  # torch's name
        """Return the transposed matrix."""
        return Int8Matrix(self.codes, self.scale, self.zero, self.symmetric, not self.transposed)

    def excess(self, exact: Tensor) -> Tensor:
        """Return by how much each weight of `exact` (float64) is off beyond the rounding of its quantisation.

        The result has the shape of `exact`. It is 0 everywhere for codes and scales that were made from these weights.
        """
        weights = exact.T if self.transposed else exact
        if self.symmetric:
            top = weights.abs().amax(0) if self.scale.dim() else weights.abs().amax()
            wanted = top / 127
        else:
            wanted = (weights.amax().clamp_min(0) - weights.amin().clamp_max(0)) / 255
        wanted = torch.where(wanted == 0, torch.ones_like(wanted), wanted)
        beyond = ((self.scale - wanted).abs() - SCALE_NOISE * wanted).clamp_min(0) * 127
        off = (weights / wanted + self.zero - self.codes).abs()
        allowed = 0.5 + NOISE if self.symmetric else 1.0 + NOISE  # the zero point is rounded as well
        result = (off - allowed).clamp_min(0) * wanted + beyond
        return result.T if self.transposed else result


def read_int8_matrix(name: str, read: Callable[[str], Tensor | None]) -> Int8Matrix | None:
    """Return the matrix that is stored under names that begin with `name`; None where the graph has none.

    read: returns the initialiser of a name in its own dtype, or None.
    """
    for ending in ENDINGS:
        codes, scale, zero = (read(f"{name}{ending}_{part}") for part in ("quantized", "scale", "zero_point"))
        if codes is None or scale is None or zero is None:
            continue
        return Int8Matrix(
            codes.to(torch.float64), scale.to(torch.float64), zero.to(torch.float64), codes.dtype == torch.int8
        )
    return None
