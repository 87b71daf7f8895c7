"""sha256 of whole files, and of files whose pieces are read by several threads."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from .input_errors import reading

if TYPE_CHECKING:  # commands that read headers only must not import torch
    from torch import Tensor

HASH_BYTES = 1 << 20


class Stopped(Exception):
    """Raised in waiting threads when another thread failed or was interrupted. The engine always catches it."""


class OrderedDigest:
    """sha256 of pieces from several threads, added in order; a waiting thread keeps its piece in the core's cache."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._turn = 0
        self._changed = threading.Condition()
        self._stopped = False

    def update(self, turn: int, piece: Tensor | bytes) -> None:
        """Add `piece` as number `turn` (0, 1, ...), after waiting for those before it. Raises Stopped after `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn == turn)
            if self._stopped:
                raise Stopped
        self._digest.update(piece if isinstance(piece, bytes) else piece.numpy().data)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file in hex, read through one buffer of 1 MiB."""
    digest = hashlib.sha256()
    buffer = bytearray(HASH_BYTES)
    view = memoryview(buffer)
    with reading(file), file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while got := stream.readinto(buffer):
            digest.update(view[:got])
    return digest.hexdigest()


def hash_files(
    files: Iterable[Path], workers: int | None = None, progress: Callable[[int], None] | None = None
) -> dict[Path, str]:
    """Return the sha256 of every file in hex, computed by `workers` threads; `progress` gets the bytes of each file."""

    def hash_file(path: Path) -> str:
        digest = file_sha256(path)
        if progress is not None:
            progress(path.stat().st_size)
        return digest

    paths = list(dict.fromkeys(files))
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="hash")
    try:
        return dict(zip(paths, pool.map(hash_file, paths), strict=True))
    finally:  # after an interrupt, only files whose hashing has begun are finished
        pool.shutdown(cancel_futures=True)
