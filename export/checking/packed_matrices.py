"""The int8 weights of onnxruntime's dynamic quantiser, and whether their codes are those of given weights.

A weight w is stored as the code q nearest to w / s + z, which stands for (q - z) s. The quantiser computes s and z from
the weights themselves: of products for every column (int8, z = 0, s = max |w| / 127), of embeddings for the whole
(uint8, s = (max(w, 0) - min(w, 0)) / 255). Both are held against the weights: codes and scales of others are found.

Source: onnxruntime/python/tools/quantization/quant_utils.py, compute_scale_zp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-3  # of a step: what float32 arithmetic moves a weight between two codes
SCALE_NOISE = 1e-4  # relative: the scale is of float32 weights
ENDINGS = ("", "_Transposed")  # before _quantized, _scale and _zero_point in a matrix's names


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A quantised matrix (rows, columns) as the graph has it."""

    codes: Tensor  # (rows, columns) float64
    scale: Tensor  # (columns,) or one value, float64
    zero: Tensor  # as `scale`
    symmetric: bool  # int8; else uint8
    turned: bool = False  # stands for the transposed matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix that it stands for."""
        return tuple(self.codes.T.shape if self.turned else self.codes.shape)

    @property
    def T(self) -> PackedMatrix:  # torch's name
        """Return the transposed matrix."""
        return PackedMatrix(self.codes, self.scale, self.zero, self.symmetric, not self.turned)

    def excess(self, exact: Tensor) -> Tensor:
        """Return by how much each weight of `exact` is off beyond what its quantisation explains, in its own unit.

        Zero everywhere for codes and scales that were made of these weights.
        """
        weights = exact.T if self.turned else exact
        if self.symmetric:
            top = weights.abs().amax(0) if self.scale.dim() else weights.abs().amax()
            wanted = top / 127
        else:
            wanted = (weights.amax().clamp_min(0) - weights.amin().clamp_max(0)) / 255
        wanted = torch.where(wanted == 0, torch.ones_like(wanted), wanted)
        beyond = ((self.scale - wanted).abs() - SCALE_NOISE * wanted).clamp_min(0) * 127
        off = (weights / wanted + self.zero - self.codes).abs()
        allowed = 0.5 + NOISE if self.symmetric else 1.0 + NOISE  # its zero point is rounded as well
        result = (off - allowed).clamp_min(0) * wanted + beyond
        return result.T if self.turned else result


def read_packed_matrix(name: str, read: Callable[[str], Tensor | None]) -> PackedMatrix | None:
    """Return the matrix that is stored under names that begin with `name`; None where there is none.

    read: gives an initialiser in its own dtype, or None.
    """
    for ending in ENDINGS:
        codes, scale, zero = (read(f"{name}{ending}_{part}") for part in ("quantized", "scale", "zero_point"))
        if codes is None or scale is None or zero is None:
            continue
        return PackedMatrix(
            codes.to(torch.float64), scale.to(torch.float64), zero.to(torch.float64), codes.dtype == torch.int8
        )
    return None
