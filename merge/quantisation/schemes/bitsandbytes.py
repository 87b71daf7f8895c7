"""bitsandbytes' 4-bit weights, nf4 and fp4: codes in blocks of the flattened weight, a largest value per block.

    weight                              flat bytes, high nibble first (of any storage dtype)
    weight.absmax                       F32 (blocks,); U8 where it is quantised again (double quantisation)
    weight.quant_map                    F32 (16,)
    weight.nested_absmax                F32 (blocks / 256,)
    weight.nested_quant_map             F32 (256,)
    weight.quant_state.bitsandbytes__*  U8, JSON: quant_type, blocksize, dtype, shape, nested_blocksize, nested_offset

Arithmetic: bitsandbytes 0.50, backends/default/ops.py, _dequantize_4bit_compute: code value times absmax in float32,
rounded once to the quant_state's dtype; functional.py, dequantize_4bit: absmax = nested code times nested absmax, plus
the offset, each in float32. Blocks run through the flattened weight, across rows. Where in_features is no multiple of
the block size, the CPU kernel of 0.50.2 gives other values than its own default backend and CUDA: the layout decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part
from adapter_merge.quantisation.rounding import to_table
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.stored_codes import decode_pairs
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

from .scaled import BITSANDBYTES_SCALE, ScaledWeight

if TYPE_CHECKING:
    from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of codes 0 .. 7; bit 3 is the sign
CODES = {"nf4": NF4, "fp4": (*(v / 12 for v in _FP4_TWELFTHS), *(-v / 12 for v in _FP4_TWELFTHS))}
SMALLEST = 1e-38  # bitsandbytes divides by no smaller absmax


@dataclass(frozen=True)
class Bitsandbytes4Weight(PackedWeight):
    """Weight (out, in). Parts: "weight", "absmax", "quant_map", "state"; nested also "nested_absmax", "nested_map"."""

    kind: str  # "nf4" or "fp4"
    block: int
    nested_block: int
    nested_offset: float

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        columns = self.shape[-1]
        start, stop = first * columns, (first + count) * columns
        raw = read(self.parts["weight"], start // 2, -(-stop // 2))
        values = decode_pairs(raw, CODES[self.kind], torch.float32, high_first=True)[start % 2 :][: stop - start]
        block, last = start // self.block, -(-stop // self.block)
        largest = self._absmax(read, block, last - block)
        if start % self.block == 0 and stop % self.block == 0:
            values.view(-1, self.block).mul_(largest[:, None])
        else:
            offset = start - block * self.block
            values = values * largest.repeat_interleave(self.block)[offset : offset + stop - start]
        return values.to(TORCH_DTYPES[self.dtype]).view(count, columns)

    def candidates(self, weight: Tensor, read: Read, draw: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored absmax, then absmax and codes of the new weight.

        With double quantisation the offset stays: it is stored in JSON, whose length may not change. The codes are
        the nearest for the absmax as it is stored, where bitsandbytes takes those for the absmax before its rounding.
        """
        flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % self.block)).view(-1, self.block)
        blocks = flat.shape[0]
        if draw is not None:
            draw = torch.nn.functional.pad(draw.reshape(-1), (0, -weight.numel() % self.block)).view(-1, self.block)
        yield {"weight": self._encoded(flat, self._absmax(read, 0, blocks), draw)}
        largest = flat.abs().amax(dim=1)
        if "nested_absmax" not in self.parts:
            yield {"weight": self._encoded(flat, largest, draw), "absmax": largest}
            return
        table = read_part(read, self.parts["nested_map"])
        around = largest - torch.tensor(self.nested_offset, dtype=torch.float32)
        grouped = torch.nn.functional.pad(around, (0, -blocks % self.nested_block)).view(-1, self.nested_block)
        nested = grouped.abs().amax(dim=1)
        scaled = (grouped / nested.clamp(min=SMALLEST)[:, None]).clamp(-1, 1)
        codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8).view(-1)[:blocks]
        decoded = self._unnested(codes, nested, table)
        yield {"weight": self._encoded(flat, decoded, draw), "absmax": codes, "nested_absmax": nested}

    def _absmax(self, read: Read, first: int, count: int) -> Tensor:
        """Return the largest values of blocks first .. first + count, float32."""
        ref = self.parts["absmax"]
        if "nested_absmax" not in self.parts:
            return read(ref, first * 4, (first + count) * 4).view(torch.float32)
        table, nested = read_part(read, self.parts["nested_map"]), read_part(read, self.parts["nested_absmax"])
        return self._unnested(read(ref, first, first + count), nested, table, first)

    def _unnested(self, codes: Tensor, nested: Tensor, table: Tensor, first: int = 0) -> Tensor:
        """Return the values of nested `codes`, those of blocks first, first + 1, ..."""
        index = torch.arange(first, first + codes.numel()) // self.nested_block
        return table[codes.int()] * nested[index] + torch.tensor(self.nested_offset, dtype=torch.float32)

    def _encoded(self, flat: Tensor, largest: Tensor, draw: Tensor | None) -> Tensor:
        """Return the packed nearest codes of `flat` (blocks, block) over `largest`, in the stored dtype and shape."""
        ref = self.parts["weight"]
        table, order = torch.tensor(CODES[self.kind]).sort()
        scaled = (flat * (1.0 / largest.clamp(min=SMALLEST))[:, None]).clamp(-1, 1)
        if draw is None:
            index = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
        else:
            index = to_table(scaled, table, draw)
        codes = order[index].to(torch.uint8).view(-1)
        packed = (codes[0::2] << 4) | codes[1::2]
        return packed[: ref.nbytes].view(TORCH_DTYPES[ref.dtype]).view(ref.shape)


ROW_FORMAT = "weight_format"  # U8 scalar: 0 is row-major, the only one that bitsandbytes still writes
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE_BYTES = 4096  # a quant_state is about 150 bytes of JSON


def find_bitsandbytes(findings: Findings) -> None:
    """Add every 4-bit and 8-bit weight of a bitsandbytes checkpoint. Reads each weight's quant_state."""
    for name in list(findings.tensors):
        weight, found, kind = name.partition(".quant_state.bitsandbytes__")
        if found:
            _add_4bit(findings, weight, findings.tensors[name], kind)
        elif name.endswith(".SCB"):
            _add_int8(findings, name)


def _add_int8(findings: Findings, name: str) -> None:
    prefix = name.removesuffix("SCB")
    ref = findings.tensors.get(f"{prefix}weight")
    if ref is None or ref.dtype != "I8" or len(ref.shape) != 2 or not all(ref.shape):
        got = "none" if ref is None else f"{ref.dtype} {list(ref.shape)}"
        findings.fault(name, "no INT8 weight beside it", "a matrix of I8", got)
        return
    layout = findings.tensors.get(prefix + ROW_FORMAT)
    if layout is not None:
        findings.side.add(layout.name)
        if layout.dtype != "U8" or layout.nbytes != 1 or int(read_tensor(layout).reshape(())) != 0:
            findings.fault(layout.name, "another order of the weight than rows", "one byte, 0")
            return
    scale = findings.part(name, ("F32",), [(ref.shape[0],)], owner=ref.name)
    if scale is not None:
        grid = ScaleGrid(ref.shape, (1, ref.shape[1]))
        findings.add(ScaledWeight(ref.name, "bitsandbytes int8", ref.shape, {"weight": ref, "scale": scale}, "F32",
                                  grid, BITSANDBYTES_SCALE))  # fmt: skip


def _add_4bit(findings: Findings, name: str, state: TensorRef, kind: str) -> None:
    settings = _read_state(state)
    faults = _state_faults(settings, kind)
    if faults:
        findings.fault(state.name, "a quant_state that is not known", got="; ".join(faults)[:300])
        return
    rows, columns = settings["shape"]
    elements, block = rows * columns, settings["blocksize"]
    blocks = -(-elements // block)
    nested = "nested_blocksize" in settings
    packed = findings.tensors.get(name)
    if packed is None or packed.nbytes != -(-elements // 2) or packed.dtype not in STORAGE_DTYPES:
        findings.fault(name, "has not the bytes that its quant_state gives", f"{-(-elements // 2)} bytes",
                       "no such tensor" if packed is None else f"{packed.nbytes} bytes of {packed.dtype}")  # fmt: skip
        return
    parts = {"weight": packed, "state": state}
    wanted = [("quant_map", "quant_map", "F32", (16,)), ("absmax", "absmax", "U8" if nested else "F32", (blocks,))]
    if nested:
        count = -(-blocks // settings["nested_blocksize"])
        wanted += [
            ("nested_absmax", "nested_absmax", "F32", (count,)),
            ("nested_map", "nested_quant_map", "F32", (256,)),
        ]
    for role, ending, dtype, shape in wanted:
        ref = findings.part(f"{name}.{ending}", (dtype,), [shape], owner=name)
        if ref is None:
            return
        parts[role] = ref
    if not torch.equal(read_tensor(parts["quant_map"]), torch.tensor(CODES[kind])):
        findings.fault(f"{name}.quant_map", f"is not the table of {kind}, which bitsandbytes takes whatever it says")
        return
    words = f"bitsandbytes {kind}{' double' if nested else ''}"
    dtype, inner = STATE_DTYPES[settings["dtype"]], settings.get("nested_blocksize", 0)
    offset = settings.get("nested_offset", 0.0)
    findings.add(Bitsandbytes4Weight(name, words, (rows, columns), parts, dtype, kind, block, inner, offset))


STORAGE_DTYPES = ("U8", "I8", "F16", "BF16", "F32", "F64")  # of bnb_4bit_quant_storage
STATE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_PLAIN_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def _read_state(state: TensorRef) -> dict[str, Any]:
    """Return the JSON object of a quant_state, or an empty one where there is none."""
    if state.dtype != "U8" or not 0 < state.nbytes <= STATE_BYTES:
        return {}
    try:
        content = json.loads(bytes(read_tensor(state).view(-1).tolist()))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _state_faults(settings: Mapping[str, Any], kind: str) -> list[str]:
    """Return what is wrong with a quant_state of a tensor whose name says `kind`."""
    keys = set(settings)
    if keys not in (_PLAIN_KEYS, _PLAIN_KEYS | _NESTED_KEYS):
        return [f"keys {', '.join(sorted(keys)) or 'none'}"]
    shape, faults = settings["shape"], []
    if kind not in CODES or settings["quant_type"] != kind:
        faults.append(f"quant_type {settings['quant_type']!r} in a tensor named {kind}")
    if type(settings["blocksize"]) is not int or settings["blocksize"] not in BLOCKS:
        faults.append(f"blocksize {settings['blocksize']!r}")
    if settings["dtype"] not in tuple(STATE_DTYPES):
        faults.append(f"dtype {settings['dtype']!r}")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        faults.append(f"shape {shape!r}")
    if keys >= _NESTED_KEYS:
        offset, size = settings["nested_offset"], settings["nested_blocksize"]
        if settings["nested_dtype"] != "float32" or type(size) is not int or size < 1:
            faults.append(f"nested_dtype {settings['nested_dtype']!r}, nested_blocksize {size!r}")
        if type(offset) is not float or not math.isfinite(offset):
            faults.append(f"nested_offset {offset!r}")
    return faults
