"""Pre-images: the base's bytes that a merge changes, from which `restore` writes the base again, byte for byte.

    OUT/preimage/<file>.bin      frames: the base's bytes, XORed with the output's where those have the same layout
    OUT/preimage/<file>.json     the base's file name, its header, and for each tensor its frames

The XOR of a bf16 weight has almost only low mantissa bits set. A frame is split into byte planes (all first
bytes, all second bytes, ...), and each plane is deflated where that makes it smaller: the plane of signs and exponents
is nearly all zeros.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adapter_merge.engine.plan import ShardPlan, TensorJob
from adapter_merge.errors import FileFormatError
from adapter_merge.storage.safetensors_header import ITEM_BYTES

from .leftovers import PREIMAGE_FOLDER
from .staging import sync_folder

SIDE = "side"  # the base's files that the output replaces: index, config, README
VERSION = 1
LEVEL = 1  # of zlib: the fastest
DEFLATE_BELOW = 0.9  # a plane is deflated when a sample of it shrinks below this share


def deflate(
    data: Tensor,  # (n,) uint8
    item: int,
) -> tuple[list[int], bytes]:
    """Return the stored size of each byte plane of n / item items (negative: not deflated), and the joined planes."""
    planes = data.view(-1, item).T.contiguous()
    sizes, stored = [], []
    for plane in planes:
        raw = plane.numpy().tobytes()
        sample = raw[:: max(1, len(raw) // 4096)]
        packed = raw
        if len(zlib.compress(sample, LEVEL)) < DEFLATE_BELOW * len(sample):
            packed = zlib.compress(raw, LEVEL)
        if len(packed) < len(raw):
            sizes.append(len(packed))
            stored.append(packed)
        else:
            sizes.append(-len(raw))
            stored.append(raw)
    return sizes, b"".join(stored)


def inflate(sizes: list[int], stored: bytes, nbytes: int) -> Tensor:  # (nbytes,) uint8
    """Return the inverse of `deflate`. Raises FileFormatError for damaged input."""
    item, position = len(sizes), 0
    if item == 0 or nbytes % item:
        raise FileFormatError("a frame of the pre-image is damaged", got=f"{item} planes of {nbytes} bytes")
    planes = []
    for size in sizes:
        piece = stored[position : position + abs(size)]
        position += abs(size)
        if size > 0:
            try:
                piece = zlib.decompressobj().decompress(piece, nbytes // item + 1)
            except zlib.error as error:
                raise FileFormatError(f"a frame of the pre-image is damaged ({error})") from error
        if len(piece) != nbytes // item:
            raise FileFormatError(
                "a frame of the pre-image is damaged", expected=f"{nbytes // item}", got=f"{len(piece)}"
            )
        planes.append(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
    return torch.stack(planes).T.contiguous().view(-1)


class _Writer:
    """The open .bin file of one output file, and the frames written to it."""

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self.stream: BinaryIO = (folder / f"{plan.file}.bin").open("xb", buffering=0)
        self.frames: dict[str, list[list[Any]]] = {}
        self.position = 0
        self.lock = threading.Lock()


class PreimageRecorder:
    """Recorder of the base's bytes that a merge changes, with one .bin file per output file. Any thread may call it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PREIMAGE_FOLDER
        self.folder.mkdir(exist_ok=True)
        self._writers: dict[str, _Writer] = {}
        self._lock = threading.Lock()

    def files(self, file: str) -> list[Path]:
        """Return the pre-image files that belong to the output file `file`."""
        return [self.folder / f"{file}.bin", self.folder / f"{file}.json"]

    def record(self, shard: ShardPlan, job: TensorJob, first: int, before: Tensor, after: Tensor | None) -> None:
        """Write `before` (n,) uint8, the base's bytes from byte `first` of the tensor, as one frame.

        after: the bytes that replace them; None where the output has none.
        """
        ref = job.original or job.source
        item = ITEM_BYTES[ref.dtype]
        xor = after is not None and job.source.dtype == job.place.dtype
        if xor:
            assert after is not None
            sizes, stored = deflate(torch.bitwise_xor(before, after), item)
        else:
            sizes, stored = deflate(before, item)
        with self._lock:
            writer = self._writers.get(shard.file)
            if writer is None:
                writer = self._writers[shard.file] = _Writer(self.folder, shard)
        with writer.lock:
            position = writer.position
            writer.position += len(stored)
            writer.frames.setdefault(ref.name, []).append([first, before.numel(), position, sizes, xor])
            written = 0
            while written < len(stored):
                written += writer.stream.write(stored[written:]) or 0

    def close(self, shard: ShardPlan) -> None:
        """Write the index of one output file's pre-image, and flush both files to the disk."""
        assert shard.source is not None
        with self._lock:
            writer = self._writers.pop(shard.file, None) or _Writer(self.folder, shard)
        with writer.stream as stream:
            os.fsync(stream.fileno())
        content = {
            "version": VERSION,
            "source": shard.source.name,
            "header": base64.b64encode(zlib.compress(shard.source_header)).decode("ascii"),
            "places": {
                (job.original or job.source).name: job.place.name
                for job in shard.jobs
                if (job.original or job.source).file == shard.source
                and (job.original or job.source).name
                == job.place.name  # not a tied head that is a copy of the embeddings
            },
            "frames": {name: sorted(frames) for name, frames in sorted(writer.frames.items())},
        }
        file = self.folder / f"{shard.file}.json"
        with file.open("x", encoding="utf-8") as text:
            json.dump(content, text, separators=(",", ":"))
            text.flush()
            os.fsync(text.fileno())
        sync_folder(self.folder)

    def abandon(self) -> None:
        """Close the open files of a failed run."""
        with self._lock:
            for writer in self._writers.values():
                writer.stream.close()
            self._writers.clear()
