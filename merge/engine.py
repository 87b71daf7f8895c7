"""Execution of a plan: blocks of rows, handed out in the files' order, computed by workers, written past the cache.

    read a block -> (hash) -> float32 -> the canonical form -> round once -> a chunk of the output -> (hash) -> disk

Nothing is ever held whole but the adapter of the tensors in work. Workers take blocks of different shards where there
are several, of one shard where there is one; each runs torch with one thread, since torch's own threads cost more on
blocks this small than they give. Forms that have to be found first (an SVD of the base) are found ahead of the blocks.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .chunks import CHUNK_BYTES, ChunkedFile, ChunkPool
from .edits import BlockEdit
from .errors import NumericsError
from .figures import FigureTotals, TensorFigures, sampled_rows
from .hashing import OrderedDigest, Stopped, file_sha256
from .lanes import Block, Lane, LaneMaker, Slot, cpu_lane, cuda_lane, is_finite
from .links import LINKS, link_file
from .plan import MergePlan, ShardPlan, TensorJob
from .sources import Sources
from .tensors import TORCH_DTYPES

CAST_BYTES = 1 << 19
WRITERS = 4
LOOK_AHEAD = 2
CUDA_WORKERS = 2  # per device: one reads and writes while the other's copies run
VRAM_FRACTION = 0.25

Progress = Callable[[int], None]
Shards = Callable[["FinishedShard"], None]


class Recorder(Protocol):
    """Keeps what a merge overwrites (preimage.py)."""

    def record(self, shard: ShardPlan, job: TensorJob, first: int, before: Tensor, after: Tensor | None) -> None:
        """Bytes `before` (n,) uint8 from byte `first` of the base's tensor became `after`, or are gone (None)."""


@dataclass(frozen=True)
class FinishedShard:
    """One output file that is on the disk."""

    file: str
    sha256: str | None  # of the output; None without hashing
    source_sha256: str | None  # of the base's file, where it was read from end to end
    figures: dict[str, TensorFigures]


@dataclass(eq=False)
class _Tensor:
    """One job's blocks and what they have found so far."""

    job: TensorJob
    shard: _Shard
    rows: int
    columns: int
    step: int  # rows in a block
    forms: Future[list[BlockEdit]] | None
    left: int  # blocks to finish
    totals: FigureTotals = field(default_factory=FigureTotals)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.step)


@dataclass(frozen=True, eq=False)
class _Task:
    """One step of a worker: rows of an edited or cast tensor, bytes of a copied one, or bytes only to be hashed."""

    shard: _Shard
    job: TensorJob
    tensor: _Tensor | None  # None: bytes
    first: int  # row, or byte of the tensor
    count: int
    turn: int | None  # in the input's hash
    write: bool = True


class _Shard:
    """One output file in work."""

    def __init__(self, plan: ShardPlan, output: ChunkedFile, hashing: bool) -> None:
        self.plan, self.output = plan, output
        self.digest = OrderedDigest() if hashing and plan.source is not None else None
        self.turns = 0
        self.tasks: Iterator[_Task] = iter(())
        self.workers = 0
        self.figures: dict[str, TensorFigures] = {}
        if self.digest is not None:
            self.digest.update(self.turn(), plan.source_header)  # type: ignore[arg-type]

    def turn(self) -> int | None:
        if self.digest is None:
            return None
        self.turns += 1
        return self.turns - 1


class _Run:
    """One execution: the state that its threads share."""

    def __init__(
        self,
        plan: MergePlan,
        shards: Sequence[ShardPlan],
        folder: Path,
        lanes: Sequence[LaneMaker],
        *,
        hashing: bool,
        direct: bool,
        link: str,
        progress: Progress | None,
        on_shard: Shards | None,
        recorder: Recorder | None,
    ) -> None:
        self.plan, self.folder, self.lanes = plan, folder, lanes
        self.hashing, self.direct, self.link = hashing, direct, link
        self.progress, self.on_shard, self.recorder = progress, on_shard, recorder
        self.delta = plan.operation == "delta"
        self.sources = Sources()
        self.pool = ChunkPool()
        self.queue = deque(shards)
        self.open: list[_Shard] = []
        self.made: list[_Shard] = []
        self.left = len(shards)
        self.failure: BaseException | None = None
        self.stopping = False
        self.lock = threading.Lock()
        self.changed = threading.Condition(threading.Lock())
        self.writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self.preparers = ThreadPoolExecutor(len(lanes), thread_name_prefix="prepare")
        self.block_bytes = CAST_BYTES

    # -- control -----------------------------------------------------------------------------------------

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guard, args=(lambda make=make: self._work(make),), name=f"merge-{number}")
            for number, make in enumerate(self.lanes)
        ]
        try:
            for thread in threads:
                thread.start()
            with self.changed:
                self.changed.wait_for(lambda: self.failure is not None or self.left == 0)
        finally:  # an interrupt as well
            self.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self.preparers.shutdown(cancel_futures=True)
            self.writers.shutdown(cancel_futures=True)
            for shard in self.made:
                shard.output.close()
            self.sources.close()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Let every thread give up at its next step."""
        with self.lock:
            self.stopping = True
            shards = list(self.made)
        self.pool.stop()
        for shard in shards:
            if shard.digest is not None:
                shard.digest.stop()

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Stopped:
            pass
        except BaseException as error:
            with self.changed:
                if self.failure is None and not self.stopping:
                    self.failure = error
                self.changed.notify_all()
            self.stop()

    def _submit(self, action: Callable[[], None]) -> None:
        try:
            self.writers.submit(self._guard, action)
        except RuntimeError:  # shut down by a failure elsewhere
            raise Stopped from None

    def _finished(self, shard: FinishedShard) -> None:
        if self.on_shard is not None:
            self.on_shard(shard)
        with self.changed:
            self.left -= 1
            self.changed.notify_all()

    # -- handing out -------------------------------------------------------------------------------------

    def _next(self, current: _Shard | None) -> _Task | None:
        """The next task, of `current` where it has one. In a file's order: the chunks and the hash rely on it."""
        with self.lock:
            while not self.stopping:
                if current is None:
                    current = self._choose()
                    if current is None:
                        return None
                    current.workers += 1
                task = next(current.tasks, None)
                if task is not None:
                    if task.write:
                        current.output.reserve(self._stop_of(task))
                    return task
                current.workers -= 1
                if current in self.open:
                    self.open.remove(current)
                current = None
            return None

    def _choose(self) -> _Shard | None:
        """An unopened shard while there are fewer open ones than workers, else the one with the fewest workers."""
        while self.queue and len(self.open) < len(self.lanes):
            plan = self.queue.popleft()
            if plan.is_copy and self.link != "copy" and self._linked(plan):
                continue
            shard = self._open(plan)
            self.open.append(shard)
            return shard
        return min(self.open, key=lambda shard: shard.workers, default=None)

    def _linked(self, plan: ShardPlan) -> bool:
        assert plan.source is not None
        source = plan.source
        if not link_file(source, self.folder / plan.file, self.link):
            return False

        def hash_it() -> None:
            found = file_sha256(source) if self.hashing else None
            if self.progress is not None:
                self.progress(plan.nbytes)
            self._finished(FinishedShard(plan.file, found, found, {}))

        self._submit(hash_it)
        return True

    def _open(self, plan: ShardPlan) -> _Shard:
        def done(sha256: str | None) -> None:
            found = shard.digest.hexdigest() if shard.digest is not None else None
            self._finished(FinishedShard(plan.file, sha256, found, shard.figures))

        output = ChunkedFile(
            self.folder / plan.file, plan.nbytes, self.pool, self._submit, done, self.hashing, self.direct
        )
        shard = _Shard(plan, output, self.hashing)
        self.made.append(shard)
        output.reserve(len(plan.header))
        output.put(torch.frombuffer(bytearray(plan.header), dtype=torch.uint8), 0)
        shard.tasks = self._tasks(shard)
        return shard

    def _stop_of(self, task: _Task) -> int:
        """The output's byte after the task's last."""
        place = task.job.place
        if task.tensor is None:
            return place.start + task.first + task.count
        return place.start + (task.first + task.count) * task.tensor.columns * TORCH_DTYPES[place.dtype].itemsize

    def _tasks(self, shard: _Shard) -> Iterator[_Task]:
        """Every task of a shard, in the order of its bytes."""
        jobs = shard.plan.jobs
        tensors: dict[int, _Tensor] = {}
        for index, job in enumerate(jobs):
            for ahead in range(index, min(len(jobs), index + 1 + LOOK_AHEAD * len(self.lanes))):
                if not jobs[ahead].is_copy and ahead not in tensors:
                    tensors[ahead] = self._prepare(jobs[ahead], shard)
            hashed = shard.plan.source is not None
            if job.original is not None:
                for first in range(0, job.original.nbytes, CAST_BYTES):
                    count = min(CAST_BYTES, job.original.nbytes - first)
                    yield _Task(shard, job, None, first, count, shard.turn(), write=False)
                hashed = False
            hashed = hashed and job.source.file == shard.plan.source and job.place.name == job.source.name
            if job.is_copy:
                first = 0
                while first < job.place.nbytes:  # up to a chunk's end: read straight into the chunk
                    room = CHUNK_BYTES - (job.place.start + first) % CHUNK_BYTES
                    count = min(CAST_BYTES, room, job.place.nbytes - first)
                    yield _Task(shard, job, None, first, count, shard.turn() if hashed else None)
                    first += count
            else:
                tensor = tensors.pop(index)
                for first in range(0, tensor.rows, tensor.step):
                    count = min(tensor.step, tensor.rows - first)
                    yield _Task(shard, job, tensor, first, count, shard.turn() if hashed else None)

    def _prepare(self, job: TensorJob, shard: _Shard) -> _Tensor:
        """A job's blocks; its forms are found on another thread."""
        shape = job.source.shape
        size = math.prod(shape)
        columns = shape[-1] if job.edits else 1
        rows = size // columns if columns else 0
        arithmetic = _arithmetic(job)
        step = max(1, self.block_bytes // (arithmetic.itemsize * max(columns, 1)))
        tensor = _Tensor(job, shard, rows, columns, step, None, -(-rows // step))
        if job.edits and rows:
            tensor.forms = self.preparers.submit(self._forms, tensor)
        return tensor

    def _forms(self, tensor: _Tensor) -> list[BlockEdit]:
        """The forms of a tensor, on the CPU, after the passes over the whole weight that some of them need first."""
        arithmetic = _arithmetic(tensor.job)
        forms = [edit.stored_edit(arithmetic) for edit in tensor.job.edits]
        for index, form in enumerate(forms):
            while form.needs_columns:  # column norms: Conv1D with DoRA or DuDe
                form = form.with_column_norms(self._columns(form, tensor, arithmetic))
            forms[index] = form
        return forms

    def _columns(self, form: BlockEdit, tensor: _Tensor, arithmetic: torch.dtype) -> Tensor:
        """The sum of the form's column_squares over all rows."""
        source = tensor.job.source
        stored = TORCH_DTYPES[source.dtype]
        row_bytes = tensor.columns * stored.itemsize
        raw = torch.empty(tensor.step * row_bytes, dtype=torch.uint8)
        work = torch.empty(tensor.step, tensor.columns, dtype=arithmetic)
        total: Tensor | None = None
        for start in range(0, tensor.rows, tensor.step):
            if self.stopping:
                raise Stopped
            count = min(tensor.step, tensor.rows - start)
            piece = raw[: count * row_bytes]
            self.sources.read(source, start * row_bytes, piece)
            found = form.column_squares(work[:count].copy_(piece.view(stored).view(count, tensor.columns)), start)
            total = found if total is None else total + found
        assert total is not None
        return total

    # -- a worker ----------------------------------------------------------------------------------------

    def _work(self, make: LaneMaker) -> None:
        lane = make()
        with torch.inference_mode():
            self._loop(lane)

    def _loop(self, lane: Lane) -> None:
        flying: deque[tuple[_Task, Slot, Tensor, Tensor, bool]] = deque()
        free = deque(lane.slots)
        placed: dict[_Tensor, list[BlockEdit]] = {}
        current: _Shard | None = None

        def land() -> None:
            task, slot, before, after, windowed = flying.popleft()
            self._land(task, slot, before, after, windowed)
            free.append(slot)

        while True:
            if self.pool.crowded:
                while flying:
                    land()
                self.pool.wait_for_room()
            task = self._next(current)
            if task is None:
                break
            current = task.shard
            if not free:
                land()
            slot = free.popleft()
            if task.tensor is None:
                self._pass_bytes(task, slot)
                free.append(slot)
                continue
            before = slot.host_in(task.count * task.tensor.columns * TORCH_DTYPES[task.job.source.dtype].itemsize)
            self._read(task, before)
            if task.tensor not in placed:
                placed.clear()
                placed[task.tensor] = self._placed_forms(task.tensor, lane)
            after, windowed = self._target(task, slot, lane)
            lane.launch(slot, self._block(task), placed[task.tensor], before, after)
            flying.append((task, slot, before, after, windowed))
            if slot.on_host:
                land()
        while flying and not self.stopping:
            land()

    def _read(self, task: _Task, buffer: Tensor) -> None:
        source = task.job.source if task.write else task.job.original
        assert source is not None
        first = task.first
        if task.tensor is not None:
            first *= task.tensor.columns * TORCH_DTYPES[source.dtype].itemsize
        self.sources.read(source, first, buffer)
        if task.turn is not None:
            assert task.shard.digest is not None
            task.shard.digest.update(task.turn, buffer)

    def _pass_bytes(self, task: _Task, slot: Slot) -> None:
        """Copy, or only hash and record, bytes that are not computed with."""
        if not task.write:
            buffer = slot.host_in(task.count)
            self._read(task, buffer)
            if self.recorder is not None:
                self.recorder.record(task.shard.plan, task.job, task.first, buffer, None)
            return
        offset = task.job.place.start + task.first
        window = task.shard.output.window(offset, task.count)
        assert window is not None, "copies end where chunks end"
        self._read(task, window)
        task.shard.output.filled(offset, task.count)
        if self.progress is not None:
            self.progress(task.count)

    def _placed_forms(self, tensor: _Tensor, lane: Lane) -> list[BlockEdit]:
        if tensor.forms is None:
            return []
        forms = tensor.forms.result()
        if lane.device.type == "cpu":
            return forms
        with lane.compute.activate():
            return [form.to(lane.device) for form in forms]

    def _target(self, task: _Task, slot: Slot, lane: Lane) -> tuple[Tensor, bool]:
        """Where the result goes: straight into the output's chunk where it lies in one, else a buffer."""
        assert task.tensor is not None
        dtype = TORCH_DTYPES[task.job.place.dtype]
        nbytes = task.count * task.tensor.columns * dtype.itemsize
        offset = task.job.place.start + task.first * task.tensor.columns * dtype.itemsize
        if slot.on_host and offset % dtype.itemsize == 0:
            window = task.shard.output.window(offset, nbytes)
            if window is not None:
                return window, True
        return slot.host_out(nbytes), False

    def _block(self, task: _Task) -> Block:
        tensor = task.tensor
        assert tensor is not None
        measured = 0
        if task.job.edits and not self.delta:
            measured = sampled_rows(task.first // tensor.step, tensor.blocks, task.count)
        return Block(
            start=task.first,
            rows=task.count,
            columns=tensor.columns,
            source=TORCH_DTYPES[task.job.source.dtype],
            arithmetic=_arithmetic(task.job),
            target=TORCH_DTYPES[task.job.place.dtype],
            delta=self.delta,
            measured=measured,
        )

    def _land(self, task: _Task, slot: Slot, before: Tensor, after: Tensor, windowed: bool) -> None:
        """Wait for a block, check it, and give it to the output."""
        tensor, place = task.tensor, task.job.place
        assert tensor is not None
        slot.mark.synchronize()
        block = self._block(task)
        if not is_finite(float(slot.host_norm), after.view(block.target)):
            raise NumericsError(
                f"{place.name}: rows {task.first} .. {task.first + task.count} would hold NaN or infinity",
                hint="values beyond the output dtype's range: try --dtype bfloat16 or float32",
            )
        if self.recorder is not None and task.job.source.file == task.shard.plan.source:
            row_bytes = tensor.columns * block.source.itemsize
            self.recorder.record(task.shard.plan, task.job, task.first * row_bytes, before, after)
        with tensor.lock:
            if block.measured:
                tensor.totals.add(slot.host_sums, block.measured * tensor.columns)
            tensor.left -= 1
            if tensor.left == 0:
                tensor.forms = None
                if task.job.edits and not self.delta:
                    task.shard.figures[place.name] = tensor.totals.figures(tensor.rows * tensor.columns)
        offset = place.start + task.first * tensor.columns * block.target.itemsize
        nbytes = after.numel()
        if windowed:
            task.shard.output.filled(offset, nbytes)
        else:
            task.shard.output.put(after, offset)
        if self.progress is not None:
            self.progress(nbytes)


def _arithmetic(job: TensorJob) -> torch.dtype:
    return torch.float64 if job.source.dtype == "F64" else torch.float32


def execute(
    plan: MergePlan,
    folder: Path,
    device: torch.device | Sequence[torch.device],
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    shards: Sequence[ShardPlan] | None = None,
    hashing: bool = True,
    direct: bool = True,
    link: str = "copy",
    vram: int | None = None,
    on_shard: Shards | None = None,
    recorder: Recorder | None = None,
) -> dict[str, FinishedShard]:
    """Write `shards` (all of the plan's where none are named) into `folder`, on the disk when this returns.

    device: one, or several CUDA devices that share the shards.
    progress: called with the bytes just written, from any thread.
    direct: write past the page cache where the file system can.
    link: how shards that no adapter touches get there (see links.py).
    vram: bytes of device memory to use per CUDA device; None takes a quarter of what is free.
    on_shard: called, one thread at a time per shard, when a shard is on the disk.
    Raises NumericsError for NaN or infinity in a result, FileFormatError for a shard that ends too early, OSError
    for what the disk refuses. The first failure stops the rest.
    """
    assert link in LINKS
    devices = [device] if isinstance(device, torch.device) else list(device)
    lanes: list[LaneMaker] = []
    block_bytes = cpu_lane().block_bytes
    if devices[0].type == "cpu":
        lanes = [cpu_lane] * (workers or max(1, len(os.sched_getaffinity(0))))
    else:
        torch.backends.cuda.matmul.allow_tf32 = False
        each = workers or CUDA_WORKERS
        for cuda in devices:
            free = torch.cuda.mem_get_info(cuda)[0]
            share = min(vram or int(free * VRAM_FRACTION), free) // each
            made = [cuda_lane(cuda, share) for _ in range(each)]
            block_bytes = made[0].block_bytes
            lanes += [lambda lane=lane: lane for lane in made]  # type: ignore[misc]
    finished: dict[str, FinishedShard] = {}

    def remember(shard: FinishedShard) -> None:
        finished[shard.file] = shard
        if on_shard is not None:
            on_shard(shard)

    run = _Run(
        plan,
        plan.shards if shards is None else shards,
        folder,
        lanes,
        hashing=hashing,
        direct=direct,
        link=link,
        progress=progress,
        on_shard=remember,
        recorder=recorder,
    )
    run.block_bytes = block_bytes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run.run()
    finally:
        torch.set_num_threads(threads)
    return finished
