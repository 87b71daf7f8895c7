"""bitsandbytes: 4-bit weights (nf4, fp4), with one scale (absmax) per block of the flattened weight, and INT8 weights.

    weight                              flat bytes, high nibble first (of any storage dtype)
    weight.absmax                       F32 (blocks,); U8 where it is quantised again (double quantisation)
    weight.quant_map                    F32 (16,)
    weight.nested_absmax                F32 (blocks / 256,)
    weight.nested_quant_map             F32 (256,)
    weight.quant_state.bitsandbytes__*  U8, JSON: quant_type, blocksize, dtype, shape, nested_blocksize, nested_offset

Arithmetic: bitsandbytes 0.50, backends/default/ops.py, _dequantize_4bit_compute: code value times absmax in float32,
rounded once to the quant_state's dtype; functional.py, dequantize_4bit: absmax = nested code times nested absmax, plus
the offset, each in float32. A block may contain the end of one row and the start of the next. Where in_features is not
a multiple of the block size, the CPU kernel of 0.50.2 returns other values than its default backend and CUDA; the
values here are those of the latter two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part
from adapter_merge.quantisation.rounding import round_to_table
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
SMALLEST = 1e-38  # lower limit of the absmax that bitsandbytes divides by


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

    def candidates(self, weight: Tensor, read: Read, uniform: Tensor | None = None) -> Iterator[Mapping[str, Tensor]]:
        """Yield codes for the stored absmax, then a new absmax with its codes.

        With double quantisation the stored offset is kept: it is part of a JSON text whose length must not change.
        Codes are chosen for the absmax as it is stored; bitsandbytes chooses them for the absmax before its rounding.
        """
        flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % self.block)).view(-1, self.block)
        blocks = flat.shape[0]
        if uniform is not None:
            uniform = torch.nn.functional.pad(uniform.reshape(-1), (0, -weight.numel() % self.block)).view(
                -1, self.block
            )
        yield {"weight": self._encoded(flat, self._absmax(read, 0, blocks), uniform)}
        largest = flat.abs().amax(dim=1)
        if "nested_absmax" not in self.parts:
            yield {"weight": self._encoded(flat, largest, uniform), "absmax": largest}
            return
        table = read_part(read, self.parts["nested_map"])
        around = largest - torch.tensor(self.nested_offset, dtype=torch.float32)
        grouped = torch.nn.functional.pad(around, (0, -blocks % self.nested_block)).view(-1, self.nested_block)
        nested = grouped.abs().amax(dim=1)
        scaled = (grouped / nested.clamp(min=SMALLEST)[:, None]).clamp(-1, 1)
        codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8).view(-1)[:blocks]
        decoded = self._decode_nested(codes, nested, table)
        yield {"weight": self._encoded(flat, decoded, uniform), "absmax": codes, "nested_absmax": nested}

    def _absmax(self, read: Read, first: int, count: int) -> Tensor:
        """Return the absmax of blocks first .. first + count, float32."""
        ref = self.parts["absmax"]
        if "nested_absmax" not in self.parts:
            return read(ref, first * 4, (first + count) * 4).view(torch.float32)
        table, nested = read_part(read, self.parts["nested_map"]), read_part(read, self.parts["nested_absmax"])
        return self._decode_nested(read(ref, first, first + count), nested, table, first)

    def _decode_nested(self, codes: Tensor, nested: Tensor, table: Tensor, first: int = 0) -> Tensor:
        """Return the absmax of blocks first, first + 1, ..., decoded from their double-quantised `codes`, float32."""
        index = torch.arange(first, first + codes.numel()) // self.nested_block
        return table[codes.int()] * nested[index] + torch.tensor(self.nested_offset, dtype=torch.float32)

    def _encoded(self, flat: Tensor, largest: Tensor, uniform: Tensor | None) -> Tensor:
        """Encode `flat` (blocks, block) for the absmax `largest`; return packed codes in the stored dtype and shape."""
        ref = self.parts["weight"]
        table, order = torch.tensor(CODES[self.kind]).sort()
        scaled = (flat * (1.0 / largest.clamp(min=SMALLEST))[:, None]).clamp(-1, 1)
        if uniform is None:
            index = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
        else:
            index = round_to_table(scaled, table, uniform)
        codes = order[index].to(torch.uint8).view(-1)
        packed = (codes[0::2] << 4) | codes[1::2]
        return packed[: ref.nbytes].view(TORCH_DTYPES[ref.dtype]).view(ref.shape)


ROW_FORMAT = "weight_format"  # U8 scalar: 0 is row-major, the only order that bitsandbytes still writes
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE_BYTES = 4096  # a quant_state is about 150 bytes of JSON


def find_bitsandbytes(findings: Findings) -> None:
    """Add every bitsandbytes weight of a checkpoint to `findings`. Reads the quant_state of each 4-bit weight."""
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
        findings.add_fault(name, "the INT8 weight of this scale is missing", "a matrix of I8", got)
        return
    layout = findings.tensors.get(prefix + ROW_FORMAT)
    if layout is not None:
        findings.side.add(layout.name)
        if layout.dtype != "U8" or layout.nbytes != 1 or int(read_tensor(layout).reshape(())) != 0:
            findings.add_fault(layout.name, "the weight is not stored row by row", "one byte, 0")
            return
    scale = findings.find_part(name, ("F32",), [(ref.shape[0],)], owner=ref.name)
    if scale is not None:
        grid = ScaleGrid(ref.shape, (1, ref.shape[1]))
        findings.add_weight(ScaledWeight(ref.name, "bitsandbytes int8", ref.shape, {"weight": ref, "scale": scale},
                                         "F32", grid, BITSANDBYTES_SCALE))  # fmt: skip


def _add_4bit(findings: Findings, name: str, state: TensorRef, kind: str) -> None:
    settings = _read_state(state)
    faults = _state_faults(settings, kind)
    if faults:
        findings.add_fault(state.name, "is a quant_state with unsupported values", got="; ".join(faults)[:300])
        return
    rows, columns = settings["shape"]
    elements, block = rows * columns, settings["blocksize"]
    blocks = -(-elements // block)
    nested = "nested_blocksize" in settings
    packed = findings.tensors.get(name)
    if packed is None or packed.nbytes != -(-elements // 2) or packed.dtype not in STORAGE_DTYPES:
        findings.add_fault(name, "does not have the size that its quant_state states", f"{-(-elements // 2)} bytes",
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
        ref = findings.find_part(f"{name}.{ending}", (dtype,), [shape], owner=name)
        if ref is None:
            return
        parts[role] = ref
    if not torch.equal(read_tensor(parts["quant_map"]), torch.tensor(CODES[kind])):
        findings.add_fault(
            f"{name}.quant_map", f"differs from the table of {kind} that bitsandbytes uses for every file"
        )
        return
    words = f"bitsandbytes {kind}{' double' if nested else ''}"
    dtype, inner = STATE_DTYPES[settings["dtype"]], settings.get("nested_blocksize", 0)
    offset = settings.get("nested_offset", 0.0)
    findings.add_weight(Bitsandbytes4Weight(name, words, (rows, columns), parts, dtype, kind, block, inner, offset))


STORAGE_DTYPES = ("U8", "I8", "F16", "BF16", "F32", "F64")  # of bnb_4bit_quant_storage
STATE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_PLAIN_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def _read_state(state: TensorRef) -> dict[str, Any]:
    """Return the JSON object of a quant_state, or an empty object where it has none."""
    if state.dtype != "U8" or not 0 < state.nbytes <= STATE_BYTES:
        return {}
    try:
        content = json.loads(bytes(read_tensor(state).view(-1).tolist()))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _state_faults(settings: Mapping[str, Any], kind: str) -> list[str]:
    """Return the faults of a quant_state that belongs to a tensor whose name states `kind`."""
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
