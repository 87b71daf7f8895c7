"""GGUF headers against the gguf package's own reader and writer, and files that are not what they say."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from adapter_merge.errors import AdapterMergeError, FileFormatError, UnsupportedError
from adapter_merge.storage.gguf_header import TYPES, read_gguf_header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def raw(
    *infos: bytes, keys: tuple[bytes, ...] = (), data: int = 4096, version: int = 3, count: int | None = None
) -> bytes:
    """A GGUF file from its parts, as docs/gguf.md lays it out."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos) if count is None else count, len(keys))
    head += b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def written(file: Path, **alignment: int) -> Path:
    """A model with every kind of metadata value, by gguf.GGUFWriter."""
    writer = gguf.GGUFWriter(file, "llama")
    if alignment:
        writer.add_custom_alignment(alignment["alignment"])
    for name, value in (
        ("uint8", 3),
        ("int8", -3),
        ("uint16", 300),
        ("int32", -70_000),
        ("uint64", 2**40),
        ("bool", True),
    ):
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_string("a.text", "Grüße")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.words", ["<s>", "</s>", "ein Wort"])
    random = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", random.standard_normal((5, 64), dtype=np.float32))
    writer.add_tensor("half", random.standard_normal((3, 4)).astype(np.float16))
    blocks = gguf.quantize(random.standard_normal((7, 96), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("experts", random.standard_normal((2, 3, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("alignment", [{}, {"alignment": 128}])
def test_everything_is_read_as_the_gguf_package_reads_it(tmp_path: Path, alignment: dict[str, int]) -> None:
    file = written(tmp_path / "a.gguf", **alignment)
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    wanted = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    wanted["a.words"] = 3  # texts of a vocabulary are counted
    assert header.metadata == wanted
    assert header.architecture == "llama"
    places = [
        (
            tensor.name,
            tensor.tensor_type.name,
            tuple(reversed(tensor.shape.tolist())),
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in reader.tensors
    ]
    assert [(item.name, item.type, item.shape, item.start, item.stop - item.start) for item in header.tensors] == places
    first = header.tensors[0]
    assert np.array_equal(np.fromfile(file, np.float32, 5 * 64, offset=first.start), reader.tensors[0].data.reshape(-1))


def test_the_table_of_types_is_ggml_s() -> None:
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert all(sizes[number] == row for number, row in TYPES.items())


@pytest.mark.parametrize("number", [number for number, row in TYPES.items() if row[1] > 1])
def test_every_listed_type_can_be_dequantised(number: int) -> None:
    _, block, nbytes = TYPES[number]
    values = gguf.dequantize(np.zeros((1, nbytes), dtype=np.uint8), gguf.GGMLQuantizationType(number))
    assert values.shape == (1, block)


def test_no_truncation_passes(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.gguf").read_bytes()
    last = max(tensor.stop for tensor in read_gguf_header(tmp_path / "a.gguf").tensors)
    for size in [*range(700), *range(700, last, 97), last - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=r"cut\.gguf"):
            read_gguf_header(tmp_path / "cut.gguf")


def test_no_changed_byte_raises_anything_else(tmp_path: Path) -> None:
    whole = bytearray(written(tmp_path / "a.gguf").read_bytes())
    random = np.random.default_rng(1)
    for position in range(4, 700):
        changed = bytearray(whole)
        changed[position] = int(random.integers(256))
        (tmp_path / "b.gguf").write_bytes(changed)
        try:
            read_gguf_header(tmp_path / "b.gguf")
        except AdapterMergeError:
            continue


KEY = string("general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4" + b"\0" * 100, "not a GGUF file"),
        (raw(info("a", (2, 2)), info("a", (2, 2), offset=32)), "occurs twice"),
        (raw(info("a", (4, 4)), info("b", (2, 2), offset=32)), "overlaps"),
        (raw(info("a", (2, 2), offset=8)), "not aligned"),
        (raw(info("a", (2, 33), kind=8)), "whole blocks"),
        (raw(info("a", (), kind=8)), "whole blocks"),
        (raw(info("a", (2**40, 2**40))), "impossible shape"),
        (raw(info("a", (2**20, 2**20))), "does not end inside the file"),
        (raw(info("a", (1,) * 40)), "40 dimensions"),
        (raw(info("a", (2, 2)), count=2**60), "does not end inside the file"),
        (raw(keys=(KEY + struct.pack("<I", 24),)), "alignment is wrong"),
        (raw(keys=(KEY + struct.pack("<I", 32),) * 2), "occurs twice"),
        (raw(keys=(string("k") + struct.pack("<I", 77),)), "unknown type"),
        (raw(keys=(string("k") + struct.pack("<IIQ", 9, 9, 1),)), "array of an unknown type"),
        (raw(keys=(string("k") + struct.pack("<IIQ", 9, 8, 2**62),)), "does not end inside the file"),
        (raw(keys=(string("k") + struct.pack("<IIQ", 9, 4, 2**62),)), "does not end inside the file"),
        (raw(keys=(string("k" * 70_000) + struct.pack("<IB", 0, 1),)), "name is too long"),
        (raw(keys=(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1),)), "not UTF-8"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "lies.gguf"
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=said):
        read_gguf_header(file)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (raw(version=1), "version 1"),
        (raw(version=0x03000000), "a big-endian file"),
        (raw(info("a", (2, 256), kind=15)), "GGML type 15"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes, got: str) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(content)
    with pytest.raises(UnsupportedError) as caught:
        read_gguf_header(file)
    assert caught.value.problems[0].got == got


def test_a_small_header_reads_itself(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(raw(info("a", (2, 4)), info("b", (1,), offset=32)))
    header: Any = read_gguf_header(tmp_path / "a.gguf")
    assert [(tensor.name, tensor.shape) for tensor in header.tensors] == [("a", (2, 4)), ("b", (1,))]
    assert header.architecture == ""
