"""A weight that is stored quantised: its dense shape, its stored parts, its rows as the library dequantises them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from adapter_merge.errors import UnsupportedError
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import ITEM_BYTES, TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .rounding import draw_for

if TYPE_CHECKING:
    from torch import Tensor

Read: TypeAlias = "Callable[[TensorRef, int, int], Tensor]"  # the bytes first .. stop of a tensor, uint8 (n,)

# What a lost part of a change weighs, over noise of the same norm. Measured on SmolLM2 with the demo's DuDe in INT4:
# without the change the KL divergence is 2.1; with all of it and noise of three times its norm, 0.10.
COHERENT = 100.0
NEARLY_ALL = 0.03  # of a change: where nearest codes lose less, none are drawn


@dataclass(frozen=True)
class PackedWeight(ABC):
    """A weight that a checkpoint stores quantised in one or more tensors. One subclass per scheme."""

    name: str  # of the dense weight, such as "model.layers.0.self_attn.q_proj.weight"
    scheme: str  # as users name it, such as "fp8 block 128x128" or "gptq int4 g128"
    shape: tuple[int, ...]  # of the dense weight: (out, in), or (experts, n, m) as transformers stacks experts
    parts: Mapping[str, TensorRef]  # the stored tensors by their role
    dtype: str  # safetensors name of the dtype that the library dequantises to

    @property
    def row_count(self) -> int:
        """The number of rows of the 2-D view, all leading dimensions together."""
        return math.prod(self.shape[:-1])

    @abstractmethod
    def rows(self, read: Read, first: int, count: int) -> Tensor:
        """Return rows first .. first + count of the 2-D view, (count, in) of `dtype`, as the library dequantises them.

        Raises FileFormatError for stored values that the scheme does not allow.
        """

    @property
    def can_pack(self) -> bool:
        """True where weights of this scheme can be quantised again."""
        return type(self).candidates is not PackedWeight.candidates

    def candidates(self, weight: Tensor, read: Read, draw: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield ways to quantise the whole dense `weight` (float32, `shape`) anew: role -> tensor as it is stored.

        First with the stored scales, then with new ones; to the nearest codes, or by `draw` (`shape`, rounding.py).
        Parts that stay as they are stored are left out. Raises UnsupportedError where the scheme is only read.
        """
        raise UnsupportedError(
            f"{self.name}: weights of {self.scheme} cannot be quantised again here",
            expected="FP8, INT4 pack-quantized, nf4 or fp4, MXFP4 or NVFP4",
            got=self.scheme,
            hint="merge into bfloat16 instead",
        )

    def uncached(self) -> PackedWeight:
        """Return this weight without what it keeps of its stored parts."""
        return self

    def pack(self, weight: Tensor, read: Read) -> Mapping[str, Tensor]:
        """Return the best way to quantise the dense `weight` (float32, `shape`): role -> tensor as it is stored.

        Of the nearest codes and of those that are drawn, with stored and with new scales, the one of the smallest
        `requantisation_loss` is taken. Parts that stay as they are stored are left out.
        """
        stored = self.rows(read, 0, self.row_count).to(torch.float32).reshape(self.shape)
        change = (weight - stored).double()
        size = float(change.square().sum())
        best: Mapping[str, Tensor] = {}
        smallest_loss = math.inf
        for draw in (None, draw_for(self.name, self.shape)):
            for parts in self.candidates(weight, read, draw):
                packed = self.uncached().rows(replaced_parts(self.parts, parts, read), 0, self.row_count)
                kept = (packed.to(torch.float32).reshape(self.shape) - stored).double()
                retention = float((kept * change).sum()) / size if size else 1.0
                error = float((kept - change).square().sum()) / (size or 1.0)
                loss = requantisation_loss(retention, math.sqrt(error))
                if loss < smallest_loss:
                    best, smallest_loss = parts, loss
        return best


def requantisation_loss(retention: float, error: float) -> float:
    """Return what is compared between ways to quantise W' again: COHERENT * (1 - retention)^2 + error^2.

    retention: <Q(W') - W, dW> / |dW|^2; error: |Q(W') - W'| / |dW|; dW = W' - W, the change from the stored weight W.
    Leaving the weight as it is has the loss COHERENT + 1.
    """
    return COHERENT * (1 - retention) ** 2 + error**2


def dense_ref(weight: PackedWeight) -> ComputedRef:
    """Return the dense weight as a tensor that is computed when it is read."""
    parts = tuple(weight.parts.values())
    nbytes = math.prod(weight.shape) * ITEM_BYTES[weight.dtype]
    files = tuple(dict.fromkeys(part.file for part in parts))
    return ComputedRef(weight.name, files[0], weight.dtype, weight.shape, 0, nbytes, weight, files)


def read_part(read: Read, ref: TensorRef) -> Tensor:
    """Read a stored part whole, in its stored dtype and shape; E8M0 codes as uint8."""
    return _typed(read(ref, 0, ref.nbytes), ref).reshape(ref.shape)


def read_part_rows(read: Read, ref: TensorRef, first: int, count: int) -> Tensor:
    """Read rows first .. first + count of a part's 2-D view (leading dimensions together), in its stored dtype."""
    raw = read(ref, first * ref.row_bytes, (first + count) * ref.row_bytes)
    return _typed(raw, ref).reshape(count, ref.shape[-1])


def _typed(raw: Tensor, ref: TensorRef) -> Tensor:
    return raw if ref.dtype == "F8_E8M0" else raw.view(TORCH_DTYPES[ref.dtype])


def replaced_parts(parts: Mapping[str, TensorRef], tensors: Mapping[str, Tensor], read: Read) -> Read:
    """Return a reader that finds `tensors` (by role) in the place of their stored parts."""
    raw = {parts[role].name: tensor.contiguous().view(-1).view(torch.uint8) for role, tensor in tensors.items()}

    def read_replaced(ref: TensorRef, start: int, stop: int) -> Tensor:
        return raw[ref.name][start:stop] if ref.name in raw else read(ref, start, stop)

    return read_replaced
