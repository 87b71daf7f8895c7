"""What a quantisation scheme provides for each weight: the dense weight's name, shape and dtype, and both conversions.

One file per scheme holds a subclass of PackedWeight; detection.py finds the packed weights of a checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapter_merge.storage.safetensors_header import TensorRef

if TYPE_CHECKING:  # `inspect` reads headers only and must not import torch
    from torch import Tensor


class PartReader(Protocol):
    """Reads stored tensors of a packed weight."""

    def __call__(self, part: TensorRef, first: int = 0, count: int | None = None) -> Tensor:
        """Return rows first .. first + count of `part`'s first dimension, all of them by default, in its stored dtype.

        A whole part is kept for the next calls, so that it is read from the file once per weight; do not change it.
        Rows of a part are read again by each call. Raises FileFormatError for a file that ends too early.
        """


@dataclass(frozen=True)
class PackedWeight(ABC):
    """One quantised weight, described by headers and config; no value is read to build it."""

    name: str  # as in an unquantised checkpoint of the model: "model.layers.0.self_attn.q_proj.weight"
    scheme: str  # for people: "fp8-block 128x128", "pack-quantized int4 g128", "gptq int4 g128", "nf4 double"
    shape: tuple[int, ...]  # as in an unquantised checkpoint of the model: (out, in), or of stacked experts
    dtype: str  # safetensors name of the dtype that the scheme's library dequantises to; it holds every value exactly
    parts: Mapping[str, TensorRef]  # role in the scheme -> stored tensor; the first one holds the packed numbers

    @abstractmethod
    def rows(self, read: PartReader, first: int, count: int) -> Tensor:
        """Return rows first .. first + count of the dense weight, as the scheme's own library dequantises them.

        (count, shape[-1]), in `dtype` or a wider float dtype with the same values. Rows are those of the 2-D view:
        the product of all leading dimensions. Called by several threads.
        """

    @abstractmethod
    def pack(self, weight: Tensor, read: PartReader) -> Mapping[str, Tensor]:
        """Quantise a whole dense weight again: role -> tensor with the stored dtype and shape of that part.

        weight: of `shape`, float32. read: reads the stored parts, for scales and zero points that may be kept.
        Raises UnsupportedError for a scheme whose weights cannot be quantised again without data.
        """


@dataclass(frozen=True)
class Packed:
    """All quantised weights of a checkpoint."""

    weights: Mapping[str, PackedWeight]  # dense name -> weight
    removed: frozenset[str]  # stored tensors that an unquantised checkpoint lacks: parts, activation scales
    notes: tuple[str, ...] = ()  # what a user should know: activations are quantised at run time, ...
