"""Reader of the zip archive that torch.save writes: the location of each record's bytes, with all headers checked.

    NAME/data.pkl      the pickle: names, shapes and locations of the tensors
    NAME/data/0, 1 ..  one record per storage, its bytes as they were in memory
    NAME/byteorder     "little" or "big"; missing in files of torch before 2.1, which are little-endian
    NAME/version       of the format

(torch/serialization.py, `_save`.) Every record is stored, never compressed, so that a tensor is a range of the file.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from adapter_merge.errors import FileFormatError

KNOWN_RECORDS = re.compile(
    r"data\.pkl|data/[0-9]{1,20}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)
VERSIONS = range(1, 11)  # the versions that torch reads (caffe2/serialize/versions.h)
MAX_PICKLE_BYTES = 128 << 20
MAX_SMALL_BYTES = 64
MAX_DIRECTORY_BYTES = 256 << 20
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
ZIP64_END = struct.Struct("<4sQ2H2I4Q4sIQI")  # the zip64 end of the directory, and its locator
DIRECTORY_END = struct.Struct("<4s4H2IH")
LOCAL_MAGIC = b"PK\x03\x04"
CENTRAL_MAGIC = b"PK\x01\x02"
DESCRIPTOR_MAGIC = b"PK\x07\x08"
HAS_DESCRIPTOR = 0x08  # flag: sizes and checksum follow the data, and the local header has zeros instead
ALL_ONES = 0xFFFFFFFF  # a 32-bit field whose value is in the zip64 record instead
IN_ZIP64 = (0xFFFF, ALL_ONES, ALL_ONES)  # count, size and offset whose values are in the zip64 record
ZIP64_EXTRA = 0x0001
# The values that torch.save (miniz) and Python's zipfile write into the fields that control reading. Other values may
# change how a reader treats an entry: bit 4 of the external attributes makes it a folder for torch.
MADE_BY = (0, 0x0314, 0x032D)
VERSIONS_NEEDED = (0, 20, 45)
FLAGS = (0, 0x0800, 0x0808)  # UTF-8 names; a descriptor
EXTERNAL = (0, 0o600 << 16)


@dataclass(frozen=True)
class Record:
    """One record: bytes start .. stop of the archive."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Entry:
    """One entry of the central directory; fields that are not listed here were checked on reading."""

    name: str
    needed: int
    flags: int
    stamp: tuple[int, int]  # time and date; no reader of tensors uses them
    crc: int
    size: int
    offset: int  # of the local header
    extra: bytes  # the zip64 record, or empty


@dataclass(frozen=True)
class TorchZip:
    """The records of one archive by name, without the archive's name as their prefix."""

    file: Path
    records: Mapping[str, Record]
    pickle: bytes


def read_torch_zip(file: Path, stream: BinaryIO) -> TorchZip:
    """Read the archive in `stream`, which was opened from `file`.

    Raises FileFormatError for a file that is not a zip file of torch.save, and for one that two readers could read
    differently: records that are compressed, encrypted, repeated or overlapping, bytes between records, local headers
    that differ from the directory, and header fields with values that neither torch nor Python's zipfile writes.
    """
    stream.seek(0)
    if stream.read(4) != LOCAL_MAGIC:
        raise FileFormatError(
            f"{file}: not a torch zip file",
            expected="torch.save's zip format (torch 1.6 and newer)",
            hint="the file is truncated, or older than torch 1.6: load and save it again with a newer torch",
        )
    count, directory, stop = _read_end(file, stream)
    named = _strip_archive_name(file, _read_directory(file, stream, count, directory, stop))
    records = _locate_all(file, stream, named, directory)
    if "data.pkl" not in records:
        _refuse(file, "has no data.pkl", expected="an archive that torch.save wrote")
    _check_version(file, stream, records)
    if records["data.pkl"].nbytes > MAX_PICKLE_BYTES:
        _refuse(file, "its pickle is too large", f"at most {MAX_PICKLE_BYTES} bytes", f"{records['data.pkl'].nbytes}")
    return TorchZip(file, records, _read_record(stream, records["data.pkl"]))


def _read_end(file: Path, stream: BinaryIO) -> tuple[int, int, int]:  # noqa: RET503
    """Return (entries, start, stop) of the directory from the record at the file's end: one disk, no comment."""
    size = stream.seek(0, os.SEEK_END)
    place = max(0, size - DIRECTORY_END.size)
    stream.seek(place)
    tail = stream.read(DIRECTORY_END.size)
    if len(tail) == DIRECTORY_END.size:
        magic, disk, first_disk, here, total, nbytes, offset, comment = DIRECTORY_END.unpack(tail)
        if magic == b"PK\x05\x06" and not disk and not first_disk and not comment and here == total:
            if ALL_ONES not in (nbytes, offset) and total != 0xFFFF and offset + nbytes == place:
                return total, offset, place
            stream.seek(max(0, place - ZIP64_END.size))
            more = stream.read(ZIP64_END.size)
            if len(more) == ZIP64_END.size and _agrees_with_zip64(more, place, (total, nbytes, offset)):
                *_, total, nbytes, offset, _, _, _, _ = ZIP64_END.unpack(more)
                return total, offset, offset + nbytes
    _refuse(file, "does not end with a zip directory", hint="the file is truncated or damaged: download it again")


def _agrees_with_zip64(more: bytes, place: int, short: tuple[int, int, int]) -> bool:
    """Return True when the zip64 end, which torch writes in every file, agrees with the end record."""
    magic, size, _, _, disk, first_disk, here, total, nbytes, offset, locator, on_disk, zip64_place, disks = (
        ZIP64_END.unpack(more)
    )
    whole = (magic, size, locator) == (b"PK\x06\x06", 44, b"PK\x06\x07") and here == total
    one_disk = not disk and not first_disk and not on_disk and disks == 1
    ends = offset + nbytes == zip64_place == place - ZIP64_END.size
    same = all(
        mine in (value, ones) for mine, value, ones in zip(short, (total, nbytes, offset), IN_ZIP64, strict=True)
    )
    return whole and one_disk and ends and same


def _read_directory(file: Path, stream: BinaryIO, count: int, start: int, stop: int) -> list[_Entry]:
    """Read all entries of the central directory, which must fill bytes start .. stop of the file."""
    if stop - start > MAX_DIRECTORY_BYTES or count * CENTRAL_HEADER.size > stop - start:
        _refuse(file, "the zip directory's end record contradicts the directory")
    stream.seek(start)
    data = stream.read(stop - start)
    entries, place = [], 0
    for _ in range(count):
        head = data[place : place + CENTRAL_HEADER.size]
        if len(head) < CENTRAL_HEADER.size or not head.startswith(CENTRAL_MAGIC):
            _refuse(file, "the zip directory's end record contradicts the directory")
        _, made_by, needed, flags, method, time, date, crc, packed, size, *rest = CENTRAL_HEADER.unpack(head)
        name_bytes, extra_bytes, comment_bytes, disk, internal, external, offset = rest
        place += CENTRAL_HEADER.size
        raw, extra = data[place : place + name_bytes], data[place + name_bytes : place + name_bytes + extra_bytes]
        place += name_bytes + extra_bytes
        if place > len(data):
            _refuse(file, "the zip directory's end record contradicts the directory")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            _refuse(file, "has a record whose name is not UTF-8")
        if method != 0 or packed != size:
            _refuse(file, f"its record {name[:80]!r} is compressed", expected="records as torch.save stores them")
        if (
            made_by not in MADE_BY
            or needed not in VERSIONS_NEEDED
            or flags not in FLAGS
            or external not in EXTERNAL
            or (comment_bytes, disk, internal) != (0, 0, 0)
        ):
            _refuse(file, f"its record {name[:80]!r} has header fields that torch.save does not write")
        size, offset = _widen(file, name, size, offset, extra)
        entries.append(_Entry(name, needed, flags, (time, date), crc, size, offset, extra))
    if place != len(data):
        _refuse(file, "the zip directory's end record contradicts the directory")
    return entries


def _widen(file: Path, name: str, size: int, offset: int, extra: bytes) -> tuple[int, int]:
    """Return (size, offset), taken from the zip64 record `extra` where their 32-bit fields are all ones."""
    wide = ([size, size] if size == ALL_ONES else []) + ([offset] if offset == ALL_ONES else [])
    expected = struct.pack("<2H", ZIP64_EXTRA, 8 * len(wide)) if wide else b""
    if len(extra) != len(expected) + 8 * len(wide) or not extra.startswith(expected):
        _refuse(file, f"its record {name[:80]!r} has extra fields that torch.save does not write")
    values = list(struct.unpack(f"<{len(wide)}Q", extra[len(expected) :]))
    if offset == ALL_ONES:
        offset = values.pop()
    if size == ALL_ONES:
        size = values[0]
        if values[1] != size:
            _refuse(file, f"its record {name[:80]!r} is compressed", expected="records as torch.save stores them")
    return size, offset


def _strip_archive_name(file: Path, entries: list[_Entry]) -> dict[str, _Entry]:
    """Return the entries by name without the archive's name. Raises FileFormatError for unknown or repeated records."""
    folder = entries[0].name.partition("/")[0] if entries else ""
    named: dict[str, _Entry] = {}
    for entry in entries:
        top, _, name = entry.name.partition("/")
        if top != folder or not KNOWN_RECORDS.fullmatch(name):
            _refuse(
                file,
                "holds a record that no torch.save of tensors writes",
                "data.pkl, data/0, ..., version, byteorder",
                repr(entry.name[:80]),
            )
        if name in named:
            _refuse(file, f"its record {name!r} occurs twice")
        named[name] = entry
    return named


def _locate_all(file: Path, stream: BinaryIO, named: Mapping[str, _Entry], directory: int) -> dict[str, Record]:
    """Locate every record; together they must fill the file up to its directory, without gaps."""
    records: dict[str, Record] = {}
    position = 0
    for name, entry in sorted(named.items(), key=lambda item: item[1].offset):
        if entry.offset != position:
            _refuse(file, f"its record {name!r} overlaps another one, or there are bytes between them")
        records[name] = _locate(file, stream, entry)
        position = records[name].stop + _descriptor_bytes(file, stream, entry, records[name])
        if position > directory:
            _refuse(file, f"its record {name!r} is outside the file")
    if position != directory:
        _refuse(file, "has bytes between its last record and its zip directory")
    return records


def _locate(file: Path, stream: BinaryIO, entry: _Entry) -> Record:
    """Locate one record's bytes; its directory entry and its local header must agree."""
    what = f"its record {entry.name!r}"
    stream.seek(entry.offset)
    head = stream.read(LOCAL_HEADER.size)
    if len(head) < LOCAL_HEADER.size:
        _refuse(file, f"{what} is outside the file")
    magic, needed, flags, method, time, date, crc, packed, size, name_bytes, extra_bytes = LOCAL_HEADER.unpack(head)
    late = bool(flags & HAS_DESCRIPTOR)
    if (
        (magic, method) != (LOCAL_MAGIC, 0)
        or stream.read(name_bytes) != entry.name.encode("utf-8")
        or (needed, flags, (time, date)) != (entry.needed, entry.flags, entry.stamp)
        or (crc, packed, size) != ((0, 0, 0) if late else (entry.crc, entry.size, entry.size))
    ):
        _refuse(file, f"{what} has a local header that contradicts the directory")
    start = entry.offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    return Record(start, start + entry.size)


def _descriptor_bytes(file: Path, stream: BinaryIO, entry: _Entry, record: Record) -> int:
    """Return the size of the descriptor after the record: checksum and sizes, of 64 bits where the entry is zip64."""
    if not entry.flags & HAS_DESCRIPTOR:
        return 0
    packed = struct.pack("<4sI2Q" if entry.extra else "<4s3I", DESCRIPTOR_MAGIC, entry.crc, entry.size, entry.size)
    stream.seek(record.stop)
    if stream.read(len(packed)) != packed:
        _refuse(file, f"its record {entry.name!r} has a descriptor that contradicts the directory")
    return len(packed)


def _check_version(file: Path, stream: BinaryIO, records: Mapping[str, Record]) -> None:
    """Raise FileFormatError for an unknown version of the format, or big-endian values."""
    text = _read_record(stream, records["version"])[:MAX_SMALL_BYTES].strip() if "version" in records else b""
    if not text.isdigit() or int(text) not in VERSIONS:
        _refuse(file, "its format version is unknown", "1 to 10", text.decode("ascii", "replace") or "none")
    for name in (".format_version", ".storage_alignment", ".data/serialization_id"):
        if name in records and not _read_record(stream, records[name])[:MAX_SMALL_BYTES].isdigit():
            _refuse(file, f"its record {name!r} is not a number")
    order = _read_record(stream, records["byteorder"])[:MAX_SMALL_BYTES] if "byteorder" in records else b"little"
    if order != b"little":
        _refuse(
            file,
            "was not written in little-endian byte order",
            "byteorder little",
            repr(order.decode("ascii", "replace")),
            "load it and save it again on a little-endian machine",
        )


def _read_record(stream: BinaryIO, record: Record) -> bytes:
    stream.seek(record.start)
    return stream.read(record.nbytes)


def _refuse(
    file: Path, cause: str, expected: str | None = None, got: str | None = None, hint: str | None = None
) -> NoReturn:
    hint = (
        hint or "the file is damaged, or was not written by torch.save: download it again, or save it again with torch"
    )
    raise FileFormatError(f"{file}: {cause}", expected=expected, got=got, hint=hint)
