"""The zip archive that torch.save writes: where each record's bytes lie, checked before they are believed.

    NAME/data.pkl      the pickle: names, shapes and places of the tensors
    NAME/data/0, 1 ..  one record a storage, its bytes as they were in memory
    NAME/byteorder     "little" or "big"; missing in files of torch before 2.1, which were little
    NAME/version       of the format

(torch/serialization.py, `_save`.) Every record is stored, never compressed, so that a tensor is a range of the file.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from adapter_merge.errors import FileFormatError

KNOWN_RECORDS = re.compile(
    r"data\.pkl|data/[0-9]{1,20}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)
VERSIONS = range(1, 11)  # what torch itself reads (caffe2/serialize/versions.h)
MAX_PICKLE_BYTES = 128 << 20
MAX_SMALL_BYTES = 64
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
ZIP64_END = struct.Struct("<4sQ2H2I4Q4sIQI")  # the zip64 end of the directory, and its locator
DIRECTORY_END = struct.Struct("<4s4H2IH")
LOCAL_MAGIC = b"PK\x03\x04"
HAS_DESCRIPTOR = 0x08  # flag: the local header leaves sizes out
ALL_ONES = 0xFFFFFFFF  # a 32-bit field whose value is in the zip64 record instead
LEFT_OUT = (0xFFFF, ALL_ONES, ALL_ONES)
ENCRYPTED = 0x01 | 0x40 | 0x2000


@dataclass(frozen=True)
class Record:
    """Bytes start .. stop of the archive."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TorchZip:
    """The records of one archive by their names, without the archive's own name before them."""

    file: Path
    records: Mapping[str, Record]
    pickle: bytes


def read_torch_zip(file: Path, stream: BinaryIO) -> TorchZip:
    """The archive in `stream`, opened from `file`.

    Raises FileFormatError for what is no zip file of torch.save, and for one that two readers could read differently:
    records that are compressed, encrypted, there twice or overlapping, and local headers that differ from the
    directory.
    """
    stream.seek(0)
    if stream.read(4) != LOCAL_MAGIC:
        raise FileFormatError(
            f"{file}: not a torch zip file",
            expected="torch.save's zip format (torch 1.6 and newer)",
            hint="the file is truncated, or older than torch 1.6: load and save it again with a newer torch",
        )
    end = _read_end(file, stream)
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            directory = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, RuntimeError, LookupError) as error:
        _refuse(file, f"the zip directory cannot be read ({error})")
    if end[0] not in (len(entries), 0xFFFF) or end[1] not in (directory, ALL_ONES):
        _refuse(file, "the zip directory's end belies the directory")
    named = _strip_archive_name(file, entries)
    found = {name: _locate(file, stream, entry) for name, entry in named.items()}
    _check_overlaps(file, found, directory)
    if "data.pkl" not in found:
        _refuse(file, "has no data.pkl", expected="an archive that torch.save wrote")
    _check_version(file, stream, found)
    if found["data.pkl"].nbytes > MAX_PICKLE_BYTES:
        _refuse(file, "its pickle is too large", f"at most {MAX_PICKLE_BYTES} bytes", f"{found['data.pkl'].nbytes}")
    return TorchZip(file, found, _content(stream, found["data.pkl"]))


def _read_end(file: Path, stream: BinaryIO) -> tuple[int, int]:  # noqa: RET503
    """(entries, offset) of the directory, as the record at the very end of the file says: one disk, no comment."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - DIRECTORY_END.size))
    tail = stream.read(DIRECTORY_END.size)
    place = max(0, size - DIRECTORY_END.size)
    if len(tail) == DIRECTORY_END.size:
        magic, disk, first_disk, here, total, nbytes, offset, comment = DIRECTORY_END.unpack(tail)
        if magic == b"PK\x05\x06" and not disk and not first_disk and not comment and here == total:
            if ALL_ONES not in (nbytes, offset) and total != 0xFFFF and offset + nbytes == place:
                return total, offset
            stream.seek(max(0, place - ZIP64_END.size))
            more = stream.read(ZIP64_END.size)
            if len(more) == ZIP64_END.size and _agrees(more, place, (total, nbytes, offset)):
                return total, offset
    _refuse(file, "does not end with a zip directory", hint="the file is truncated or damaged: fetch it again")


def _agrees(more: bytes, place: int, short: tuple[int, int, int]) -> bool:
    """True when the zip64 end, which torch writes in every file, says what the end says or leaves to it."""
    magic, left, _, _, disk, first_disk, here, total, nbytes, offset, locator, on_disk, found, disks = ZIP64_END.unpack(
        more
    )
    whole = (magic, left, locator) == (b"PK\x06\x06", 44, b"PK\x06\x07") and here == total
    one_disk = not disk and not first_disk and not on_disk and disks == 1
    ends = offset + nbytes == found == place - ZIP64_END.size
    same = all(
        mine in (value, ones) for mine, value, ones in zip(short, (total, nbytes, offset), LEFT_OUT, strict=True)
    )
    return whole and one_disk and ends and same


def _strip_archive_name(file: Path, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    folder = entries[0].filename.partition("/")[0] if entries else ""
    named: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        top, _, name = entry.filename.partition("/")
        # orig_filename: zipfile cuts a name at its first NUL, other readers do not.
        if top != folder or entry.orig_filename != entry.filename or entry.volume or not KNOWN_RECORDS.fullmatch(name):
            _refuse(
                file,
                "holds a record that no torch.save of tensors writes",
                "data.pkl, data/0, ..., version, byteorder",
                repr(entry.filename[:80]),
            )
        if name in named:
            _refuse(file, f"its record {name!r} is there twice")
        named[name] = entry
    return named


def _locate(file: Path, stream: BinaryIO, entry: zipfile.ZipInfo) -> Record:
    """The record's bytes, as its directory entry and its local header both say."""
    what = f"its record {entry.filename!r}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        _refuse(file, f"{what} is compressed", expected="records as torch.save stores them")
    if entry.header_offset < 0:
        _refuse(file, f"{what} lies outside the file")
    stream.seek(entry.header_offset)
    head = stream.read(LOCAL_HEADER.size)
    if len(head) < LOCAL_HEADER.size:
        _refuse(file, f"{what} lies outside the file")
    magic, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes = LOCAL_HEADER.unpack(head)
    name = stream.read(name_bytes)
    if magic != LOCAL_MAGIC or method != zipfile.ZIP_STORED or name != entry.filename.encode("utf-8"):
        _refuse(file, f"{what} has a local header that the directory belies")
    if (flags | entry.flag_bits) & ENCRYPTED:
        _refuse(file, f"{what} is encrypted")
    sizes = {0, entry.file_size} if flags & HAS_DESCRIPTOR else {entry.file_size}
    if not {packed, size} <= sizes | {ALL_ONES}:
        _refuse(file, f"{what} has two sizes", str(entry.file_size), str(size))
    start = entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    return Record(start, start + entry.file_size)


def _check_overlaps(file: Path, found: Mapping[str, Record], directory: int) -> None:
    position = 0
    for name, record in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if record.start < position + LOCAL_HEADER.size or record.stop > directory:
            _refuse(file, f"its record {name!r} overlaps another one, or ends after the file")
        position = record.stop


def _check_version(file: Path, stream: BinaryIO, found: Mapping[str, Record]) -> None:
    text = _content(stream, found["version"])[:MAX_SMALL_BYTES].strip() if "version" in found else b""
    if not text.isdigit() or int(text) not in VERSIONS:
        _refuse(file, "its format version is unknown", "1 to 10", text.decode("ascii", "replace") or "none")
    for name in (".format_version", ".storage_alignment", ".data/serialization_id"):
        if name in found and not _content(stream, found[name])[:MAX_SMALL_BYTES].isdigit():
            _refuse(file, f"its record {name!r} is no number")
    order = _content(stream, found["byteorder"])[:MAX_SMALL_BYTES] if "byteorder" in found else b"little"
    if order != b"little":
        _refuse(
            file,
            "was not written in little-endian byte order",
            "byteorder little",
            repr(order.decode("ascii", "replace")),
            "load it and save it again on a little-endian machine",
        )


def _content(stream: BinaryIO, record: Record) -> bytes:
    stream.seek(record.start)
    return stream.read(record.nbytes)


def _refuse(
    file: Path, cause: str, expected: str | None = None, got: str | None = None, hint: str | None = None
) -> NoReturn:
    hint = hint or "the file is damaged, or was not written by torch.save: fetch it again, or save it again with torch"
    raise FileFormatError(f"{file}: {cause}", expected=expected, got=got, hint=hint)
