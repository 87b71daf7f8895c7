"""The interface of a quantised weight: its stored tensors, its dequantised rows, and its requantisation."""

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

from .rounding import uniform_numbers

if TYPE_CHECKING:
    from torch import Tensor

Read: TypeAlias = "Callable[[TensorRef, int, int], Tensor]"  # the bytes first .. stop of a tensor, uint8 (n,)

# Weight of (1 - retention)^2 in requantisation_loss, relative to the squared error. Measured on SmolLM2 in INT4 with
# the demo's DuDe: losing dW costs a KL divergence of 2.1; keeping dW with random noise of three times its norm, 0.10.
LOST_CHANGE_WEIGHT = 100.0
ACCEPTED_LOSS = 0.03  # of dW: where nearest codes lose less than this share, no random rounding is tried


@dataclass(frozen=True)
class PackedWeight(ABC):
    """A weight that a checkpoint stores quantised, in one or more tensors ("parts"). One subclass per scheme."""

    name: str  # of the dense weight, such as "model.layers.0.self_attn.q_proj.weight"
    scheme: str  # as users name it, such as "fp8 block 128x128" or "gptq int4 g128"
    shape: tuple[int, ...]  # of the dense weight: (out, in), or (experts, n, m) as transformers stacks experts
    parts: Mapping[str, TensorRef]  # the stored tensors by their role
    dtype: str  # safetensors name of the dtype that the library dequantises to

    @property
    def row_count(self) -> int:
        """The number of rows of the weight as a matrix: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @abstractmethod
    def rows(self, read: Read, first: int, count: int) -> Tensor:
        """Return rows first .. first + count, dequantised as the scheme's library does it: (count, in) of `dtype`.

        Rows are counted over all leading dimensions. Raises FileFormatError for stored values that are not valid.
        """

    @property
    def can_pack(self) -> bool:
        """True where weights of this scheme can be requantised."""
        return type(self).candidates is not PackedWeight.candidates

    def candidates(self, weight: Tensor, read: Read, uniform: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield quantisations of the whole dense `weight` (float32, `shape`): role -> new content of that part.

        The first keeps the stored scales, the second has new scales. Codes are the nearest ones, or, with `uniform`
        (random numbers of [0, 1), `shape`), stochastically rounded (rounding.py). Unchanged parts are not in the
        mapping. Raises UnsupportedError where weights of the scheme cannot be requantised.
        """
        raise UnsupportedError(
            f"{self.name}: weights of {self.scheme} can be read, but not quantised again",
            expected="FP8, INT4 pack-quantized, nf4 or fp4, MXFP4 or NVFP4",
            got=self.scheme,
            hint="merge into bfloat16 instead",
        )

    def uncached(self) -> PackedWeight:
        """Return this weight without cached parts."""
        return self

    def pack(self, weight: Tensor, read: Read) -> Mapping[str, Tensor]:
        """Return the quantisation of the dense `weight` (float32, `shape`) with the smallest `requantisation_loss`.

        Tries nearest and stochastically rounded codes, each with stored and with new scales. The result maps roles to
        new contents; unchanged parts are not in it.
        """
        stored = self.rows(read, 0, self.row_count).to(torch.float32).reshape(self.shape)
        change = (weight - stored).double()
        size = float(change.square().sum())
        best: Mapping[str, Tensor] = {}
        smallest_loss = math.inf
        for uniform in (None, uniform_numbers(self.name, self.shape)):
            for parts in self.candidates(weight, read, uniform):
                packed = self.uncached().rows(replaced_parts(self.parts, parts, read), 0, self.row_count)
                kept = (packed.to(torch.float32).reshape(self.shape) - stored).double()
                retention = float((kept * change).sum()) / size if size else 1.0
                error = float((kept - change).square().sum()) / (size or 1.0)
                loss = requantisation_loss(retention, math.sqrt(error))
                if loss < smallest_loss:
                    best, smallest_loss = parts, loss
        return best


def requantisation_loss(retention: float, error: float) -> float:
    """Return the loss of a quantisation of W': LOST_CHANGE_WEIGHT * (1 - retention)^2 + error^2.

    retention: <Q(W') - W, dW> / |dW|^2; error: |Q(W') - W'| / |dW|; dW = W' - W, the change from the stored weight W.
    A weight that is left unchanged has the loss LOST_CHANGE_WEIGHT + 1.
    """
    return LOST_CHANGE_WEIGHT * (1 - retention) ** 2 + error**2


def dense_ref(weight: PackedWeight) -> ComputedRef:
    """Return the dense weight as a ComputedRef: it is dequantised when it is read."""
    parts = tuple(weight.parts.values())
    nbytes = math.prod(weight.shape) * ITEM_BYTES[weight.dtype]
    files = tuple(dict.fromkeys(part.file for part in parts))
    return ComputedRef(weight.name, files[0], weight.dtype, weight.shape, 0, nbytes, weight, files)


def read_part(read: Read, ref: TensorRef) -> Tensor:
    """Read a whole stored part in its stored dtype and shape; E8M0 codes as uint8."""
    return _typed(read(ref, 0, ref.nbytes), ref).reshape(ref.shape)


def read_part_rows(read: Read, ref: TensorRef, first: int, count: int) -> Tensor:
    """Read rows first .. first + count of a part, counted over all leading dimensions, in its stored dtype."""
    raw = read(ref, first * ref.row_bytes, (first + count) * ref.row_bytes)
    return _typed(raw, ref).reshape(count, ref.shape[-1])


def _typed(raw: Tensor, ref: TensorRef) -> Tensor:
    return raw if ref.dtype == "F8_E8M0" else raw.view(TORCH_DTYPES[ref.dtype])


def replaced_parts(parts: Mapping[str, TensorRef], tensors: Mapping[str, Tensor], read: Read) -> Read:
    """Return a reader that reads `tensors` (by role) instead of the stored parts, and other parts from `read`."""
    raw = {parts[role].name: tensor.contiguous().view(-1).view(torch.uint8) for role, tensor in tensors.items()}

    def read_replaced(ref: TensorRef, start: int, stop: int) -> Tensor:
        return raw[ref.name][start:stop] if ref.name in raw else read(ref, start, stop)

    return read_replaced
