"""Reader and writer of safetensors headers: 8 bytes length, a JSON header, then the tensors' bytes.

Nothing here imports torch or reads a weight. A header is checked before it is used: lengths are inside the
file, dtypes are known, byte ranges agree with shapes, do not overlap and leave no gap, and names are unique (format:
the README of the safetensors repository, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

from adapter_merge.errors import FileFormatError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32  # of a tensor; the limit of numpy 1
MAX_SIZE = 2**63 - 1  # of a dimension, an offset or a whole tensor; torch's sizes are signed
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
ALIGNMENT = 8


@dataclass(frozen=True)
class TensorRef:
    """Location of one tensor: bytes start .. stop of `file`, row-major, little-endian."""

    name: str
    file: Path
    dtype: str  # safetensors name: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read for the tensor."""
        return (self.file,)

    @property
    def rows(self) -> int:
        """The number of rows of the 2-D view, the product of all leading dimensions; 1 for scalars and vectors."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0

    def as_matrix(self) -> Self:
        """Return the same bytes as a matrix (first dimension, all others): a convolution's weight as (out, in k k)."""
        return replace(self, shape=(self.shape[0], math.prod(self.shape[1:]))) if len(self.shape) > 2 else self


@dataclass(frozen=True)
class Header:
    """One safetensors file: its tensors in the order of their bytes, and its string metadata."""

    file: Path
    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    data_start: int


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} occurs twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _parse_integer(text: str) -> int:
    """Parse an integer as Python does, but refuse -0 and integers that are too long to be a size."""
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"the number {text[:24]} is not a size")
    return int(text)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _shorten(value: object) -> str:
    """Return a value shortened for an error message: a header may hold 100 MB."""
    if isinstance(value, list) and len(value) > MAX_DIMENSIONS:
        return f"{len(value)} entries"
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def read_header(file: Path) -> Header:
    """Read and check the header of `file`. Raises FileFormatError for any malformed or inconsistent entry."""
    text, size = _read_text(file)
    content = _parse_text(file, text)
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _fail(file, "__metadata__ is not a map of strings")
    data_start = 8 + len(text)
    tensors = [_parse_entry(file, name, entry, data_start) for name, entry in content.items()]
    tensors.sort(key=lambda ref: (ref.start, ref.stop))
    position = data_start
    for ref in tensors:
        if ref.start != position:
            _fail(file, f"tensor {ref.name!r} overlaps another tensor, or there is a gap before it")
        position = ref.stop
    if position != size:
        _fail(file, "the file's length is wrong", expected=f"{position} bytes", got=f"{size} bytes")
    return Header(file, tuple(tensors), metadata, data_start)


def _fail(file: Path, cause: str, *, expected: str | None = None, got: str | None = None) -> NoReturn:
    hint = "the file is truncated or damaged: download it again"
    raise FileFormatError(f"{file}: {cause}", expected=expected, got=got, hint=hint)


def _read_text(file: Path) -> tuple[bytes, int]:
    """Return the bytes of the JSON header, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                _fail(file, "not a safetensors file", expected="at least 8 bytes", got=f"{len(prefix)} bytes")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                expected = f"at most {size - 8} bytes"
                _fail(file, "the header's length is wrong", expected=expected, got=f"{length} bytes")
            return stream.read(length), size
    except OSError as error:
        raise FileFormatError(f"{file}: {error.strerror or error}") from error


def _parse_text(file: Path, text: bytes) -> dict[str, Any]:
    """Return the JSON object in the header."""
    try:
        if not text.startswith(b"{"):
            _fail(file, "the header does not begin with {")
        content: dict[str, Any] = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
        )
        if b"\\ud" in text.lower():  # half a surrogate pair can be read but not written
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        _fail(file, f"the header is not valid JSON ({_shorten(error)})")
    return content


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    """Return the location of the tensor that a header's entry describes; data_start: of the tensors' bytes."""
    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        _fail(file, f"tensor {name!r} must have exactly the keys dtype, shape and data_offsets", got=_shorten(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _fail(file, f"tensor {name!r} has an unknown dtype", expected=", ".join(ITEM_BYTES), got=_shorten(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        expected = f"up to {MAX_DIMENSIONS} sizes below 2^63"
        _fail(file, f"tensor {name!r} has an impossible shape", expected=expected, got=_shorten(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _fail(file, f"tensor {name!r} has impossible offsets", got=_shorten(offsets))
    need = ITEM_BYTES[dtype]
    for count in shape:  # in this order: safetensors also refuses a shape that overflows before a size 0
        need *= count
        if need > MAX_SIZE:
            _fail(file, f"tensor {name!r} has an impossible shape", expected="below 2^63 bytes", got=_shorten(shape))
    if offsets[1] - offsets[0] != need:
        _fail(
            file,
            f"tensor {name!r}: its byte range does not have the size of its shape",
            expected=f"{need} bytes for {dtype} {shape}",
            got=f"{offsets[1] - offsets[0]} bytes",
        )
    return TensorRef(name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def layout(
    file: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorRef, ...]]:
    """Return the header's bytes and the locations of `tensors` (name, dtype, shape) for a new file, in their order."""
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    position = 0
    places = []
    for name, dtype, shape in tensors:
        stop = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        places.append((name, dtype, shape, position, stop))
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    start = 8 + len(text)
    refs = tuple(TensorRef(name, file, dtype, shape, start + a, start + b) for name, dtype, shape, a, b in places)
    return len(text).to_bytes(8, "little") + text, refs
