"""sha256 of whole files, of files whose pieces are read by several threads, and of files begun ahead of their use."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # command lines that only read headers do without torch
    from torch import Tensor

HASH_BYTES = 1 << 20
HEAD_START_THREADS = 2
HEAD_START_BYTES = 32 << 20  # at once: an import holds the interpreter for 5 ms before it lets another thread in


class Stopped(Exception):
    """Another thread failed or was interrupted; whoever waits gives up. Never leaves the engine."""


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(eq=False)
class Begun:
    """The sha256 of a file's first `nbytes` bytes, to be gone on with."""

    file: Path
    identity: tuple[int, int, int, int]
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    nbytes: int = 0

    @property
    def is_unchanged(self) -> bool:
        """True while the file is, by device, inode, size and time, the one that was begun."""
        try:
            return _identity(self.file.stat()) == self.identity
        except OSError:
            return False


class HeadStart:
    """Threads that hash files while the process does something else: importing torch takes a second on one core.

    On a machine with one core there are none. What fails here is left to whoever reads the file in earnest.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = iter([file for file in files if file.is_file()])  # a pipe would never end
        self._lock = threading.Lock()
        self._begun: dict[Path, Begun] = {}
        self._stopping = False
        count = min(HEAD_START_THREADS, len(os.sched_getaffinity(0)) - 1)
        self._threads = [threading.Thread(target=self._work, name="head-start", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> dict[Path, Begun]:
        """What was begun so far; nothing more is read."""
        self._stopping = True
        for thread in self._threads:
            thread.join()
        return self._begun

    def _work(self) -> None:
        while not self._stopping:
            with self._lock:
                file = next(self._files, None)
            if file is None:
                return
            try:
                self._hash(file)
            except (OSError, MemoryError):
                self._begun.pop(file, None)

    def _hash(self, file: Path) -> None:
        view = memoryview(bytearray(min(HEAD_START_BYTES, file.stat().st_size)))
        with file.open("rb", buffering=0) as stream:
            begun = self._begun[file] = Begun(file, _identity(os.fstat(stream.fileno())))
            while not self._stopping and (got := stream.readinto(view)):
                begun.digest.update(view[:got])
                begun.nbytes += got


class OrderedDigest:
    """sha256 over pieces that come out of order: each waits for its turn, while it is still in its core's cache.

    begun: the hash of the file's first bytes, to go on with.
    """

    def __init__(self, begun: Begun | None = None) -> None:
        self._digest = hashlib.sha256() if begun is None else begun.digest
        self._turn = 0
        self._changed = threading.Condition()
        self._stopped = False

    def update(self, turn: int, piece: Tensor | bytes, known: int = 0) -> None:
        """Take `piece`, less its first `known` bytes, as the turn-th one (0, 1, ...). Raises Stopped after `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn == turn)
            if self._stopped:
                raise Stopped
        self._digest.update(memoryview(piece if isinstance(piece, bytes) else piece.numpy().data)[known:])
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def file_sha256(file: Path, begun: Begun | None = None) -> str:
    """The file's sha256, in hex; one buffer, whatever its size."""
    digest = hashlib.sha256() if begun is None else begun.digest
    buffer = bytearray(HASH_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        stream.seek(0 if begun is None else begun.nbytes)
        while got := stream.readinto(buffer):
            digest.update(view[:got])
    return digest.hexdigest()


def hash_files(
    files: Iterable[Path], workers: int | None = None, progress: Callable[[int], None] | None = None
) -> dict[Path, str]:
    """sha256 of every file, several at a time. progress: called with the bytes of each."""

    def one(path: Path) -> str:
        found = file_sha256(path)
        if progress is not None:
            progress(path.stat().st_size)
        return found

    paths = list(dict.fromkeys(files))
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="hash")
    try:
        return dict(zip(paths, pool.map(one, paths), strict=True))
    finally:  # after an interrupt, only the files in work are finished
        pool.shutdown(cancel_futures=True)
