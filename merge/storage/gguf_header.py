"""Reader of GGUF headers: magic, metadata (key, type, value), tensor infos, then the tensors' blocks.

Nothing here imports torch, numpy or the gguf package, or reads a weight. A header is checked before it is used:
counts and lengths are inside the file, types are known, rows consist of whole blocks, and byte ranges do not overlap.
Format: ggml-org/ggml, docs/gguf.md; block sizes: gguf.constants.GGML_QUANT_SIZES.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adapter_merge.errors import FileFormatError, UnsupportedError
from adapter_merge.files.input_errors import reading

from .safetensors_header import MAX_DIMENSIONS, MAX_SIZE, TensorRef

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 65_535
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # types of plain values -> safetensors dtype
# Number in the file -> name, values in a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# Type of a metadata value -> struct format; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Location of one tensor: blocks in bytes start .. stop of the file, row-major, little-endian."""

    name: str
    type: str  # "F32", "Q8_0", ...
    shape: tuple[int, ...]  # as torch has it: (out, in)
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of one GGUF file. An array of strings (a vocabulary) is represented by its length."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The value of general.architecture; "" where the file does not state it."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""


def stored_tensor(tensor: GgufTensor, file: Path) -> TensorRef:
    """Return a reference to the tensor's bytes, (rows, bytes of a row) uint8."""
    rows = math.prod(tensor.shape[:-1])
    shape = (rows, (tensor.stop - tensor.start) // rows) if rows else (0, 0)
    return TensorRef(tensor.name, file, "U8", shape, tensor.start, tensor.stop)


def read_gguf_header(file: Path) -> GgufHeader:
    """Read and check the header of `file`.

    Raises FileFormatError for a malformed or inconsistent header, UnsupportedError for another version or byte order
    and for a type of tensor that the gguf package cannot dequantise.
    """
    with reading(file), file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise FileFormatError(f"{file}: not a GGUF file", expected="the bytes GGUF at its start")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Parser(file, content).read_header()


class _Parser:
    """Parser of a header: its bytes and the current position."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file, self.content, self.size, self.position = file, content, len(content), 4

    def fail(self, cause: str, *, expected: str | None = None, got: str | None = None) -> NoReturn:
        """Raise FileFormatError."""
        hint = "the file is truncated or damaged: download it again"
        raise FileFormatError(f"{self.file}: {cause}", expected=expected, got=got, hint=hint)

    def skip(self, nbytes: int) -> int:
        """Advance by `nbytes` bytes; return the position before. Raises FileFormatError beyond the end of the file."""
        start = self.position
        if nbytes > self.size - start:
            self.fail("the header does not end inside the file", got=f"{nbytes} bytes at byte {start} of {self.size}")
        self.position += nbytes
        return start

    def read_numbers(self, format: str) -> tuple[Any, ...]:
        """Read little-endian numbers by a struct format."""
        return struct.unpack_from(f"<{format}", self.content, self.skip(struct.calcsize(f"<{format}")))

    def read_number(self, format: str) -> Any:
        return self.read_numbers(format)[0]

    def read_string(self, limit: int | None = None) -> str:
        length = self.read_number("Q")
        if limit is not None and length > limit:
            self.fail("a name is too long", expected=f"at most {limit} bytes", got=str(length))
        start = self.skip(length)
        try:
            return self.content[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"a string at byte {start} is not UTF-8 ({error.reason})")

    def read_header(self) -> GgufHeader:
        """Read and check the whole header."""
        version, count, keys = self.read_numbers("IQQ")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise UnsupportedError(
                f"{self.file}: cannot be read",
                expected=f"GGUF version {' or '.join(map(str, VERSIONS))}, little-endian",
                got="a big-endian file" if swapped else f"version {version}",
            )
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.read_string(MAX_NAME_BYTES)
            if key in metadata:
                self.fail(f"the key {key!r:.200} occurs twice")
            metadata[key] = self.read_value(self.read_number("I"), key)
        infos = [self.read_info() for _ in range(count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail("general.alignment is wrong", expected="a power of two", got=f"{alignment!r:.100}")
        data = -(-self.position // alignment) * alignment
        tensors = [self.locate(*info, data, alignment) for info in infos]
        self.check_places(tensors)
        return GgufHeader(self.file, metadata, tuple(tensors))

    def read_value(self, kind: int, key: str) -> Any:
        """Read a metadata value of type `kind`."""
        if kind in SCALARS:
            return self.read_number(SCALARS[kind])
        if kind == STRING:
            return self.read_string()
        if kind != ARRAY:
            self.fail(f"the key {key!r:.200} has an unknown type", got=str(kind))
        element, count = self.read_numbers("IQ")
        if element in SCALARS:
            width = struct.calcsize(SCALARS[element])
            start = self.skip(count * width)
            return list(struct.unpack_from(f"<{count}{SCALARS[element]}", self.content, start))
        if element != STRING:
            self.fail(f"the key {key!r:.200} is an array of an unknown type", got=str(element))
        for _ in range(count):
            self.skip(self.read_number("Q"))
        return count

    def read_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's name, shape, number of the type, and offset in the data."""
        name = self.read_string(MAX_NAME_BYTES)
        dimensions = self.read_number("I")
        if dimensions > MAX_DIMENSIONS:
            self.fail(f"tensor {name!r} has an impossible shape", got=f"{dimensions} dimensions")
        shape = self.read_numbers(f"{dimensions}Q")
        kind, offset = self.read_numbers("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def locate(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, alignment: int
    ) -> GgufTensor:
        if kind not in TYPES:
            raise UnsupportedError(
                f"{self.file}: tensor {name!r} has a type that cannot be dequantised",
                expected=", ".join(name for name, _, _ in TYPES.values()),
                got=f"GGML type {kind}",
            )
        type, block, block_bytes = TYPES[kind]
        count = math.prod(shape)
        if count > MAX_SIZE:
            self.fail(f"tensor {name!r} has an impossible shape", got=str(shape))
        if block > 1 and (not shape or shape[-1] % block):
            self.fail(
                f"tensor {name!r}: its rows do not consist of whole blocks",
                expected=f"multiples of {block}",
                got=str(shape),
            )
        if offset % alignment:
            self.fail(f"tensor {name!r} is not aligned", expected=f"a multiple of {alignment}", got=str(offset))
        start, nbytes = data + offset, count // block * block_bytes
        if start + nbytes > self.size:
            self.fail(
                f"tensor {name!r} does not end inside the file",
                expected=f"at least {start + nbytes} bytes",
                got=f"{self.size} bytes",
            )
        return GgufTensor(name, type, shape, start, start + nbytes)

    def check_places(self, tensors: list[GgufTensor]) -> None:
        """Raise FileFormatError for two tensors of one name, and for tensors that share bytes."""
        names: set[str] = set()
        position = 0
        for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.name in names:
                self.fail(f"the tensor {tensor.name!r} occurs twice")
            if tensor.start < position:
                self.fail(f"tensor {tensor.name!r} overlaps another one")
            names.add(tensor.name)
            position = tensor.stop
