"""The weights that QLoRA trains on, deq(nf4(W)), computed from the unquantised weight W.

With load_in_4bit, transformers quantises an unquantised checkpoint while it loads it; the quantised weights are in no
file. Arithmetic: bitsandbytes 0.50, functional.py, quantize_4bit (absmax per block of the flattened weight;
with compress_statistics, absmax - mean quantised in blocks of 256 on the dynamic map) and dequantize_4bit; backends/
default/ops.py for rounding: the nearest code, by midpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from adapter_merge.errors import InputError
from adapter_merge.quantisation.schemes.bitsandbytes import CODES, SMALLEST
from adapter_merge.storage.computed_tensor import ComputedRef, ReadBytes
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import ITEM_BYTES, TensorRef
from adapter_merge.storage.tensor_io import SAFETENSORS_DTYPES, TORCH_DTYPES

from .transposed_cache import TransposedCache

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL = "original"
NESTED_BLOCK = 256
STEP = 1 << 20  # elements read in one step
SYNTAX = "original, nf4, nf4-double, fp4 or fp4-double, optionally followed by ,block=64 and ,dtype=bfloat16"


@dataclass(frozen=True)
class TrainedOn:
    """How bitsandbytes quantised the base at training."""

    kind: str  # "nf4" or "fp4"
    double: bool  # bnb_4bit_use_double_quant
    block: int = 64  # elements per absmax; transformers has no option for it
    dtype: str | None = None  # safetensors name of the dtype that the model was loaded in; None: the stored dtype

    def __str__(self) -> str:
        text = f"{self.kind}{'-double' if self.double else ''},block={self.block}"
        names = {name: user for user, name in SAFETENSORS_DTYPES.items()}
        return text if self.dtype is None else f"{text},dtype={names[self.dtype]}"


def parse_trained_on(text: str) -> TrainedOn | None:
    """Parse `text` (SYNTAX); return None for "original". Raises InputError."""
    scheme, *settings = text.split(",")
    kind, _, double = scheme.partition("-")
    values = dict(setting.partition("=")[::2] for setting in settings)
    twice = len(values) < len(settings)
    block, dtype = values.pop("block", "64"), values.pop("dtype", None)
    known = scheme == ORIGINAL or (kind in CODES and double in ("", "double"))
    good = not values and not twice and block in ("32", "64", "128", "256", "512", "1024", "2048", "4096")
    if not known or not good or (scheme == ORIGINAL and settings) or dtype not in (None, *SAFETENSORS_DTYPES):
        raise InputError(f"--trained-on {text}: not known", expected=SYNTAX)
    if scheme == ORIGINAL:
        return None
    return TrainedOn(kind, bool(double), int(block), None if dtype is None else SAFETENSORS_DTYPES[dtype])


@dataclass(frozen=True)
class SimulatedWeight:
    """deq(q(W)) of the stored weight W, `ref` (out, in), computed by rows."""

    ref: TensorRef
    settings: TrainedOn
    kept: TransposedCache = field(repr=False, compare=False)

    @property
    def dtype(self) -> str:
        return self.settings.dtype or self.ref.dtype

    def as_ref(self) -> ComputedRef:
        """Return the weight as a ComputedRef, the form of weights in a dense view."""
        nbytes = math.prod(self.ref.shape) * ITEM_BYTES[self.dtype]
        return ComputedRef(self.ref.name, self.ref.file, self.dtype, self.ref.shape, 0, nbytes, self, (self.ref.file,))

    def rows(self, read: ReadBytes, first: int, count: int) -> Tensor:
        """Return rows first .. first + count, (count, in) of `dtype`."""
        columns, block = self.ref.shape[-1], self.settings.block
        start, stop = first * columns, (first + count) * columns
        begin = start // block * block
        values = self._read(read, begin, stop)
        largest = self._largest(values)
        table = torch.tensor(CODES[self.settings.kind]).sort().values
        scaled = values.view(-1, block) * (1.0 / largest.clamp(min=SMALLEST))[:, None]
        codes = torch.bucketize(scaled.clamp_(-1, 1), (table[:-1] + table[1:]) / 2)
        if self.settings.double:
            largest = self._nested(read)[begin // block :][: largest.numel()]
        made = (table[codes] * largest[:, None]).view(-1)[start - begin : stop - begin]
        return made.to(TORCH_DTYPES[self.dtype]).view(count, columns)

    def _read(self, read: ReadBytes, begin: int, stop: int) -> Tensor:
        """Return elements begin .. stop as float32, with `stop` rounded up to a whole block.

        Elements behind the end of the weight are zero.
        """
        item, block = ITEM_BYTES[self.ref.dtype], self.settings.block
        end = -(-stop // block) * block
        held = min(end, math.prod(self.ref.shape))
        values = read(self.ref, begin * item, held * item).view(TORCH_DTYPES[self.ref.dtype])
        values = values.to(TORCH_DTYPES[self.dtype]).to(torch.float32)
        return torch.nn.functional.pad(values, (0, end - held))

    def _largest(self, values: Tensor) -> Tensor:
        return values.view(-1, self.settings.block).abs().amax(dim=1)

    def _nested(self, read: ReadBytes) -> Tensor:
        """Return the absmax of every block after double quantisation, float32 (blocks,)."""
        return self.kept.get(self.ref.name, lambda: (self._quantise_largest(read),))[0]

    def _quantise_largest(self, read: ReadBytes) -> Tensor:
        count, step = math.prod(self.ref.shape), STEP // self.settings.block * self.settings.block
        pieces = range(0, count, step)
        largest = torch.cat([self._largest(self._read(read, first, min(count, first + step))) for first in pieces])
        offset = largest.mean()
        around = torch.nn.functional.pad(largest - offset, (0, -largest.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        nested = around.abs().amax(dim=1)
        table = dynamic_map()
        scaled = (around * (1.0 / nested.clamp(min=SMALLEST))[:, None]).clamp(-1, 1)
        codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
        return (table[codes] * nested[:, None]).view(-1)[: largest.numel()] + offset


@cache
def dynamic_map() -> Tensor:
    """Return the 256 values of bitsandbytes' signed dynamic map (functional.py, create_dynamic_map), sorted.

    Midpoints of 2^e equal steps from 0.1 to 1, times 10^(e - 6), for e = 0 .. 6, with both signs; 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middle = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [middle, -middle]
    return torch.cat(values).sort().values
