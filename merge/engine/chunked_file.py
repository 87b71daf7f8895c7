"""One output file, written in aligned chunks past the page cache, hashed in order while it is written.

The output has to reach the disk before its name may change, so writing into the page cache only to flush it costs a
copy, a page allocation and a wait. Chunks of a file are filled by any worker in any order; whoever fills the last
byte hands the chunk to the writer threads. The sha256 takes chunks in the file's order, the disk in any order.
Where O_DIRECT is refused (tmpfs, some network file systems) the same chunks go through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 2 << 20
BUFFERED_BYTES = 256 << 10  # written at once into the page cache: at 2 MB Linux looks for huge pages, ten times slower
ALIGNMENT = 4096  # a multiple of every disk's logical block size
QUEUED_CHUNKS = 8  # full chunks that may wait for hash and disk before the workers wait for them

O_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned_bytes(nbytes: int) -> Tensor:
    """(nbytes,) uint8 at a page's start, its memory taken from the system in one piece."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)


class ChunkPool:
    """Buffers used again for every chunk, and the brake on workers that are faster than the disk.

    make: a new buffer of so many bytes, at a page's start.
    """

    def __init__(self, limit: int = QUEUED_CHUNKS, make: Callable[[int], Tensor] = aligned_bytes) -> None:
        self.limit, self.make = limit, make
        self.waiting = 0  # full chunks not yet on the disk
        self.stopped = False
        self._free: list[Tensor] = []
        self._changed = threading.Condition()

    def take(self) -> Tensor:
        """A buffer of CHUNK_BYTES; never waits (see `wait_for_room`)."""
        with self._changed:
            if self._free:
                return self._free.pop()
        return self.make(CHUNK_BYTES)

    def full(self) -> None:
        """A chunk is full and waits for the disk."""
        with self._changed:
            self.waiting += 1

    def written(self, buffer: Tensor) -> None:
        """A chunk is on the disk; its buffer is free."""
        with self._changed:
            self.waiting -= 1
            self._free.append(buffer)
            self._changed.notify_all()

    @property
    def crowded(self) -> bool:
        return self.waiting >= self.limit

    def wait_for_room(self) -> None:
        """Wait until the disk has caught up. Only full chunks count, so whoever waits holds nothing up."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self.waiting < self.limit)

    def stop(self) -> None:
        """Let everybody go."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


def _spans(offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """(chunk, first byte in it, bytes) of a file's bytes from `offset`."""
    stop = offset + nbytes
    while offset < stop:
        index, start = divmod(offset, CHUNK_BYTES)
        size = min(CHUNK_BYTES - start, stop - offset)
        yield index, start, size
        offset += size


@dataclass(eq=False)
class _Chunk:
    index: int
    buffer: Tensor  # (CHUNK_BYTES,) uint8
    nbytes: int  # of the file in this chunk
    missing: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    views: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def typed(self, dtype: torch.dtype) -> Tensor:
        """The buffer's elements of `dtype`."""
        view = self.views.get(dtype)
        if view is None:
            view = self.views[dtype] = self.buffer.view(dtype)
        return view


class ChunkedFile:
    """A file of known size, written piece by piece.

    submit: runs a function on a writer thread. done: called there with the sha256 (None without hashing) once all
    is on the disk. `reserve` is called in the file's order, by one thread at a time; `put` in any order by any thread.
    """

    def __init__(
        self,
        path: Path,
        nbytes: int,
        pool: ChunkPool,
        submit: Callable[[Callable[[], None]], None],
        done: Callable[[str | None], None],
        hashing: bool = True,
        direct: bool = True,
    ) -> None:
        self.path, self.nbytes, self.pool, self.submit, self.done = path, nbytes, pool, submit, done
        self._left = -(-nbytes // CHUNK_BYTES)
        self._chunks: dict[int, _Chunk] = {}
        self._reserved = 0
        self._lock = threading.Lock()
        self._digest = hashlib.sha256() if hashing else None
        self._hash_next = 0
        self._hash_ready: dict[int, _Chunk] = {}
        self._hash_busy = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._fd = -1
        if direct and O_DIRECT:
            try:
                self._fd = os.open(path, flags | O_DIRECT, 0o666)
            except FileExistsError:
                raise
            except OSError:  # the file system has no direct writes; some create the file before they say so
                path.unlink(missing_ok=True)
        self._direct = self._fd >= 0
        if not self._direct:
            self._fd = os.open(path, flags, 0o666)
        os.ftruncate(self._fd, nbytes)

    def reserve(self, stop: int) -> None:
        """Provide buffers for all bytes before `stop`."""
        while self._reserved * CHUNK_BYTES < stop:
            index = self._reserved
            nbytes = min(CHUNK_BYTES, self.nbytes - index * CHUNK_BYTES)
            self._chunks[index] = _Chunk(index, self.pool.take(), nbytes, nbytes)
            self._reserved += 1

    def put(self, data: Tensor, offset: int) -> None:
        """Bytes (n,) uint8, reserved before, at `offset`."""
        for piece in self.pieces(offset, data.numel()):
            piece.copy_(data[: piece.numel()])
            data = data[piece.numel() :]
            self.filled(offset, piece.numel())
            offset += piece.numel()

    def pieces(self, offset: int, nbytes: int) -> list[Tensor]:
        """The file's own buffers for these bytes, (n,) uint8 each, to write to; then call `filled`."""
        return [self._chunks[index].buffer[start : start + size] for index, start, size in _spans(offset, nbytes)]

    def window(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """(rows, columns) of the file's own buffer to write to, when they lie in one chunk; then call `filled`."""
        index, start = divmod(offset, CHUNK_BYTES)
        place, odd = divmod(start, dtype.itemsize)
        if odd or start + rows * columns * dtype.itemsize > CHUNK_BYTES:
            return None
        return self._chunks[index].typed(dtype).as_strided((rows, columns), (columns, 1), place)

    def filled(self, offset: int, nbytes: int) -> None:
        """The window or the pieces at `offset` hold their bytes."""
        for index, _, size in _spans(offset, nbytes):
            self._filled(self._chunks[index], size)

    def close(self) -> None:
        """Give the descriptor back, whatever state the file is in."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _filled(self, chunk: _Chunk, size: int) -> None:
        with chunk.lock:
            chunk.missing -= size
            assert chunk.missing >= 0, "bytes written twice"
            if chunk.missing:
                return
        self.pool.full()
        if self._digest is None:
            self.submit(lambda: self._write(chunk))
            return
        with self._lock:
            self._hash_ready[chunk.index] = chunk
            if self._hash_busy or chunk.index != self._hash_next:
                return
            self._hash_busy = True
        self.submit(self._hash)

    def _hash(self) -> None:
        """Hash the chunks that are ready, in order; one thread at a time."""
        assert self._digest is not None
        while True:
            with self._lock:
                chunk = self._hash_ready.pop(self._hash_next, None)
                if chunk is None:
                    self._hash_busy = False
                    return
                self._hash_next += 1
            self._digest.update(chunk.buffer[: chunk.nbytes].numpy().data)
            self.submit(lambda chunk=chunk: self._write(chunk))  # type: ignore[misc]

    def _write(self, chunk: _Chunk) -> None:
        offset = chunk.index * CHUNK_BYTES
        padded = chunk.nbytes + -chunk.nbytes % ALIGNMENT  # the file is cut to its size at the end
        data = chunk.buffer[: padded if self._direct else chunk.nbytes].numpy().data
        done, refused = 0, False
        while done < len(data):
            try:
                stop = len(data) if self._direct else done + BUFFERED_BYTES
                done += os.pwrite(self._fd, data[done:stop], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or refused:
                    raise
                refused = True  # opened for direct writes, but refused here: through the page cache then
                self._direct = False
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~O_DIRECT)
        with self._lock:
            del self._chunks[chunk.index]
            self._left -= 1
            last = self._left == 0
        self.pool.written(chunk.buffer)
        if last:
            self._finish()

    def _finish(self) -> None:
        os.ftruncate(self._fd, self.nbytes)
        os.fsync(self._fd)
        self.close()
        self.done(self._digest.hexdigest() if self._digest is not None else None)
