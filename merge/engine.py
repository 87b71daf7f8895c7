"""Execution of a plan: worker threads, one tensor each, block by block through reused buffers.

    read a block of rows -> float32 -> the canonical form -> round once -> write

Nothing is ever held whole but the block and the adapter. Each worker runs torch with one thread: torch's own threads
on blocks this small cost more than they give. Untouched tensors are copied in the kernel (copy_file_range).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import NumericsError
from .form import CanonicalForm
from .headers import TensorRef
from .plan import MergePlan, TensorJob
from .tensors import TORCH_DTYPES, pread_into, raw_bytes

BLOCK_BYTES = 1 << 20  # of float32: stays in a core's second-level cache
COPY_BYTES = 64 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorFigures:
    """What one tensor's merge did, in float32 norms."""

    relative_delta: float  # ||W' - W0|| / ||W0||
    rounding: float  # ||round(W') - W'|| / ||W' - W0||
    changed: float  # fraction of elements whose stored value changed


class _Worker:
    """One thread's buffers, grown to the largest block it has met and used again for every block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._work = [torch.empty(0, dtype=torch.float32, device=device) for _ in range(2)]
        self._out = torch.empty(0, dtype=torch.uint8)

    def raw(self, nbytes: int) -> Tensor:
        if self._raw.numel() < nbytes:
            self._raw = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return self._raw[:nbytes]

    def out(self, nbytes: int) -> Tensor:
        if self._out.numel() < nbytes:
            self._out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return self._out[:nbytes]

    def work(self, index: int, rows: int, columns: int) -> Tensor:
        if self._work[index].numel() < rows * columns:
            self._work[index] = torch.empty(rows * columns, dtype=torch.float32, device=self.device)
        return self._work[index][: rows * columns].view(rows, columns)


def execute(
    plan: MergePlan,
    folder: Path,
    device: torch.device,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TensorFigures]:
    """Write every shard of `plan` into `folder`, fsynced. Returns figures per edited tensor.

    Raises NumericsError for NaN or infinity in a result, FileFormatError for a shard that ends too early, OSError
    for what the disk refuses. The first failure stops the rest.
    """
    workers = workers or max(1, len(os.sched_getaffinity(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    local = threading.local()
    stop = threading.Event()
    figures: dict[str, TensorFigures] = {}

    def run(job: TensorJob, fd: int) -> None:
        if stop.is_set():
            return
        if not hasattr(local, "worker"):
            local.worker = _Worker(device)
        if job.is_copy:
            _copy(job, fd)
        else:
            found = _transform(job, fd, local.worker, plan.operation)
            if found is not None:
                figures[job.place.name] = found
        if progress is not None:
            progress(job.place.nbytes)

    fds = []
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
            futures: list[Future[None]] = []
            for shard in plan.shards:
                fd = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                fds.append(fd)
                os.pwrite(fd, shard.header, 0)
                os.ftruncate(fd, shard.nbytes)
                futures += [pool.submit(run, job, fd) for job in shard.jobs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                stop.set()
                raise
            for future in futures:
                if future.done() and future.exception() is not None:
                    stop.set()
                    future.result()
        for fd in fds:
            os.fsync(fd)
    finally:
        for fd in fds:
            os.close(fd)
        torch.set_num_threads(threads)
    return figures


def _copy(job: TensorJob, fd: int) -> None:
    """Copy a tensor's bytes in the kernel."""
    with job.source.file.open("rb") as stream:
        done = 0
        while done < job.source.nbytes:
            size = min(COPY_BYTES, job.source.nbytes - done)
            try:
                got = os.copy_file_range(stream.fileno(), fd, size, job.source.start + done, job.place.start + done)
            except OSError:  # across some file systems the kernel cannot
                got = 0
            if got == 0:
                buffer = bytearray(size)
                pread_into(stream.fileno(), memoryview(buffer), job.source.start + done, str(job.source.file))
                _pwrite_all(fd, memoryview(buffer), job.place.start + done)
                got = size
            done += got


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _transform(job: TensorJob, fd: int, worker: _Worker, operation: str) -> TensorFigures | None:
    """Stream one tensor through its edits. Blocks of whole rows; a vector is one row."""
    source = job.source
    columns = source.shape[-1] if source.shape else 1
    rows = math.prod(source.shape) // columns if columns else 0
    if rows == 0:
        return None
    if job.edits and len(source.shape) == 1:
        raise AssertionError("only matrices are adapted")
    step = max(1, BLOCK_BYTES // (4 * columns))
    forms = [edit.stored_form().to(worker.device) for edit in job.edits]
    with source.file.open("rb") as stream:
        reader = _BlockReader(stream.fileno(), source, columns, worker)
        forms = [_with_columns(form, reader, rows, step) for form in forms]
        sums = _Sums()
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw, block = reader.read(start, count, 0)
            if operation == "delta":
                result = forms[0].delta_rows(block, start)
            else:
                result = block
                for form in forms:
                    form.apply_(result, start)
            target = TORCH_DTYPES[job.place.dtype]
            nbytes = count * columns * target.itemsize
            out = worker.out(nbytes).view(target).view(count, columns)
            out.copy_(result)
            if not math.isfinite(float(out.sum(dtype=torch.float32))) and not bool(torch.isfinite(out).all()):
                raise NumericsError(
                    f"{job.place.name}: rows {start} .. {start + count} would hold NaN or infinity",
                    hint="values beyond the output dtype's range: try --dtype bfloat16 or float32",
                )
            if forms and operation == "merge":
                sums.add(raw, result, out, worker.work(1, count, columns))
            _pwrite_all(fd, raw_bytes(out), job.place.start + start * columns * target.itemsize)
    return sums.figures(rows * columns) if forms and operation == "merge" else None


class _BlockReader:
    """Rows of one tensor, as they are stored and as float32 on the worker's device."""

    def __init__(self, fd: int, source: TensorRef, columns: int, worker: _Worker) -> None:
        self.fd, self.source, self.columns, self.worker = fd, source, columns, worker
        self.dtype = TORCH_DTYPES[source.dtype]

    def read(self, start: int, count: int, index: int) -> tuple[Tensor, Tensor]:
        nbytes = count * self.columns * self.dtype.itemsize
        buffer = self.worker.raw(nbytes)
        offset = self.source.start + start * self.columns * self.dtype.itemsize
        pread_into(self.fd, buffer.numpy().data, offset, str(self.source.file))
        raw = buffer.view(self.dtype).view(count, self.columns)
        block = self.worker.work(index, count, self.columns)
        return raw, block.copy_(raw)


def _with_columns(form: CanonicalForm, reader: _BlockReader, rows: int, step: int) -> CanonicalForm:
    """Column norms take a pass of their own before the merge (Conv1D weights with DoRA or DuDe)."""
    if not form.needs_columns:
        return form
    squares = torch.zeros(reader.columns, dtype=torch.float64, device=reader.worker.device)
    for start in range(0, rows, step):
        _, block = reader.read(start, min(step, rows - start), 0)
        squares += form.column_squares(block, start)
    return form.with_column_norms(squares)


class _Sums:
    """Squares of a tensor's blocks, added up in Python floats (float64)."""

    def __init__(self) -> None:
        self.base = self.delta = self.rounding = 0.0
        self.changed = 0

    def add(self, raw: Tensor, result: Tensor, out: Tensor, work: Tensor) -> None:
        """raw and out (n, columns) as stored, result float32; `work` is overwritten."""
        work.copy_(raw)
        self.base += float(torch.linalg.vector_norm(work)) ** 2
        self.delta += float(torch.linalg.vector_norm(work.sub_(result))) ** 2
        work.copy_(out)
        self.rounding += float(torch.linalg.vector_norm(work.sub_(result))) ** 2
        self.changed += int((out != raw).sum()) if out.dtype == raw.dtype else out.numel()

    def figures(self, count: int) -> TensorFigures:
        return TensorFigures(
            math.sqrt(self.delta / self.base) if self.base else 0.0,
            math.sqrt(self.rounding / self.delta) if self.delta else 0.0,
            self.changed / count,
        )
