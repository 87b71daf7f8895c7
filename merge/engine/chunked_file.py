"""Writing of one output file in aligned chunks, past the page cache, with its sha256 computed along the way.

An output file must be on the disk before it is renamed. Writing into the page cache and then flushing it would cost a
copy, a page allocation and a wait, so chunks are written with O_DIRECT. Any worker may fill any part of a chunk; the
worker that fills its last byte hands the chunk to the writer threads. Chunks are hashed in the file's order and
written in any order. Where the file system refuses O_DIRECT (tmpfs, some network file systems), the same chunks are
written through the page cache.
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
BUFFERED_BYTES = 256 << 10  # of one write into the page cache: with 2 MB, Linux looks for huge pages (10 times slower)
ALIGNMENT = 4096  # bytes; a multiple of every disk's logical block size, which O_DIRECT requires
QUEUED_CHUNKS = 8  # full chunks that may wait to be hashed and written before the workers have to wait

O_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned_bytes(nbytes: int) -> Tensor:
    """Allocate (nbytes,) uint8 that begins at a memory page, as one anonymous mapping."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)


class ChunkPool:
    """Pool of reusable chunk buffers; it makes workers wait when they are faster than the disk.

    limit: how many full chunks may wait to be written.
    make: allocates a buffer of the given number of bytes that begins at a memory page.
    """

    def __init__(self, limit: int = QUEUED_CHUNKS, make: Callable[[int], Tensor] = aligned_bytes) -> None:
        self.limit, self.make = limit, make
        self.waiting = 0  # full chunks not yet on the disk
        self.stopped = False
        self._free: list[Tensor] = []
        self._changed = threading.Condition()

    def take(self) -> Tensor:
        """Return a buffer of CHUNK_BYTES, uint8. Never waits; workers wait in `wait_until_below_limit`."""
        with self._changed:
            if self._free:
                return self._free.pop()
        return self.make(CHUNK_BYTES)

    def add_waiting(self) -> None:
        """Count one more chunk that is full and waits to be written."""
        with self._changed:
            self.waiting += 1

    def give_back(self, buffer: Tensor) -> None:
        """Take back the buffer of a chunk that has been written."""
        with self._changed:
            self.waiting -= 1
            self._free.append(buffer)
            self._changed.notify_all()

    @property
    def at_limit(self) -> bool:
        """True while as many full chunks wait to be written as may."""
        return self.waiting >= self.limit

    def wait_until_below_limit(self) -> None:
        """Wait until fewer than `limit` full chunks wait to be written, or until `stop`.

        Partly filled chunks do not count, so a worker that waits here cannot keep the others from continuing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self.waiting < self.limit)

    def stop(self) -> None:
        """Release every thread that waits here, for good."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


def _split_at_chunks(offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (index of the chunk, first byte in it, number of bytes) for `nbytes` of a file from `offset`."""
    stop = offset + nbytes
    while offset < stop:
        index, start = divmod(offset, CHUNK_BYTES)
        size = min(CHUNK_BYTES - start, stop - offset)
        yield index, start, size
        offset += size


@dataclass(eq=False)
class _Chunk:
    """One chunk of the file, until it is written."""

    index: int
    buffer: Tensor  # (CHUNK_BYTES,) uint8
    nbytes: int  # of the file in this chunk
    missing: int  # bytes that nobody has filled yet
    lock: threading.Lock = field(default_factory=threading.Lock)
    views: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def view_as(self, dtype: torch.dtype) -> Tensor:
        """Return the whole buffer as elements of `dtype`."""
        view = self.views.get(dtype)
        if view is None:
            view = self.views[dtype] = self.buffer.view(dtype)
        return view


class ChunkedFile:
    """Output file of known size that is written in pieces.

    submit: runs a function on a writer thread.
    on_finished: called on a writer thread with the file's sha256 (None without hashing) once the file is on the disk.
    Call `reserve` in the file's order, by one thread at a time. Any thread may fill what is reserved, in any order.
    Raises FileExistsError where `path` exists.
    """

    def __init__(
        self,
        path: Path,
        nbytes: int,
        pool: ChunkPool,
        submit: Callable[[Callable[[], None]], None],
        on_finished: Callable[[str | None], None],
        hashing: bool = True,
        direct: bool = True,
    ) -> None:
        self.path, self.nbytes, self.pool, self.submit, self.on_finished = path, nbytes, pool, submit, on_finished
        self._chunks_left = -(-nbytes // CHUNK_BYTES)
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
            except OSError:  # no O_DIRECT on this file system; some create the file before they refuse
                path.unlink(missing_ok=True)
        self._direct = self._fd >= 0
        if not self._direct:
            self._fd = os.open(path, flags, 0o666)
        os.ftruncate(self._fd, nbytes)

    def reserve(self, stop: int) -> None:
        """Take buffers for all bytes before `stop`."""
        while self._reserved * CHUNK_BYTES < stop:
            index = self._reserved
            nbytes = min(CHUNK_BYTES, self.nbytes - index * CHUNK_BYTES)
            self._chunks[index] = _Chunk(index, self.pool.take(), nbytes, nbytes)
            self._reserved += 1

    def put(self, data: Tensor, offset: int) -> None:
        """Copy `data` (n,) uint8 to the file's byte `offset`; these bytes must be reserved."""
        for piece in self.pieces(offset, data.numel()):
            piece.copy_(data[: piece.numel()])
            data = data[piece.numel() :]
            self.mark_filled(offset, piece.numel())
            offset += piece.numel()

    def pieces(self, offset: int, nbytes: int) -> list[Tensor]:
        """Return the parts of the chunk buffers that hold these bytes, (n,) uint8 each.

        The caller writes to them and then calls `mark_filled`.
        """
        return [
            self._chunks[index].buffer[start : start + size] for index, start, size in _split_at_chunks(offset, nbytes)
        ]

    def window(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return the chunk buffer's part at `offset` as (rows, columns) of `dtype`.

        None where it crosses a chunk's end or is not aligned to `dtype`. The caller writes to it and then calls
        `mark_filled`.
        """
        index, start = divmod(offset, CHUNK_BYTES)
        place, odd = divmod(start, dtype.itemsize)
        if odd or start + rows * columns * dtype.itemsize > CHUNK_BYTES:
            return None
        return self._chunks[index].view_as(dtype).as_strided((rows, columns), (columns, 1), place)

    def mark_filled(self, offset: int, nbytes: int) -> None:
        """Record that the buffers hold these bytes; chunks that are now full are hashed and written."""
        for index, _, size in _split_at_chunks(offset, nbytes):
            self._subtract_missing(self._chunks[index], size)

    def close(self) -> None:
        """Close the file descriptor, also of a file that is not complete."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _subtract_missing(self, chunk: _Chunk, size: int) -> None:
        """Count `size` more bytes of `chunk` as filled; a full chunk goes on to be hashed and written."""
        with chunk.lock:
            chunk.missing -= size
            assert chunk.missing >= 0, "bytes filled twice"
            if chunk.missing:
                return
        self.pool.add_waiting()
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
        """Hash the full chunks that come next in the file's order, then have them written. One thread at a time."""
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
        """Write one full chunk; the thread that writes the last chunk finishes the file."""
        offset = chunk.index * CHUNK_BYTES
        padded = chunk.nbytes + -chunk.nbytes % ALIGNMENT  # _finish cuts the file to its size
        data = chunk.buffer[: padded if self._direct else chunk.nbytes].numpy().data
        written, refused = 0, False
        while written < len(data):
            try:
                stop = len(data) if self._direct else written + BUFFERED_BYTES
                written += os.pwrite(self._fd, data[written:stop], offset + written)
            except OSError as error:
                if error.errno != errno.EINVAL or refused:
                    raise
                refused = True  # the file could be opened with O_DIRECT but not written: use the page cache
                self._direct = False
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~O_DIRECT)
        with self._lock:
            del self._chunks[chunk.index]
            self._chunks_left -= 1
            last = self._chunks_left == 0
        self.pool.give_back(chunk.buffer)
        if last:
            self._finish()

    def _finish(self) -> None:
        """Cut the file to its size, flush it to the disk, close it, and report its sha256."""
        os.ftruncate(self._fd, self.nbytes)
        os.fsync(self._fd)
        self.close()
        self.on_finished(self._digest.hexdigest() if self._digest is not None else None)
