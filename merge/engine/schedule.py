"""Who works on what: tasks handed out in the files' order, of different shards to different workers where it can be.

Forms that have to be found first (an SVD of the base, column norms) are found on threads ahead of the blocks.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.storage.hashing import Stopped, file_sha256
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.links import link_file
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .chunked_file import ChunkedFile, ChunkPool
from .cuda_lanes import CudaQueue
from .devices import set_own_threads
from .lanes import Queue, current_device
from .plan import ShardPlan, TensorJob
from .rounding_figures import TensorFigures
from .run_settings import RunSettings
from .tasks import ShardWork, Task, TensorWork, arithmetic_of, form_bytes

LOOK_AHEAD = 2
AHEAD_BYTES = 64 << 20  # of forms, beyond which none is found before its turn: workers times shards are many


@dataclass(frozen=True)
class FinishedShard:
    """One output file that is on the disk."""

    file: str
    sha256: str | None  # of the output; None without hashing
    source_sha256: str | None  # of the base's file, where it was read from end to end
    figures: dict[str, TensorFigures]


class Schedule:
    """The shards of one run, opened when a worker has nothing else to do.

    device: where passes over a whole weight are taken.
    submit: runs a function on a writer thread. finished: called when a shard is on the disk.
    """

    def __init__(
        self,
        shards: Sequence[ShardPlan],
        settings: RunSettings,
        sources: Sources,
        pool: ChunkPool,
        submit: Callable[[Callable[[], None]], None],
        finished: Callable[[FinishedShard], None],
    ) -> None:
        self.settings, self.sources, self.pool = settings, sources, pool
        self._submit, self._finished = submit, finished
        self.stopping = False
        self._queue = deque(shards)
        self._open_shards: list[ShardWork] = []
        self._made: list[ShardWork] = []
        self._prepared: list[TensorWork] = []
        self._lock = threading.Lock()
        # A device's memory is given out for one pass at a time, and each thread that multiplies takes some of it.
        self._passes = ThreadPoolExecutor(1, "pass") if settings.device.type == "cuda" else None
        self._pass_queue: Queue | None = None
        self._preparers = ThreadPoolExecutor(
            settings.workers, "prepare", set_own_threads, (1,)
        )  # each thread has its own
        self._threads = [self._preparers] if self._passes is None else [self._preparers, self._passes]

    def stop(self) -> None:
        """Let every worker give up at its next step."""
        with self._lock:
            self.stopping = True
            shards = list(self._made)
        for shard in shards:
            if shard.digest is not None:
                shard.digest.stop()
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)  # a decomposition may take minutes

    def close(self) -> None:
        """Give threads and descriptors back, whatever state the files are in; nobody works any more."""
        for threads in self._threads:
            threads.shutdown(cancel_futures=True)
        for shard in self._made:
            shard.output.close()

    def next(self, current: ShardWork | None) -> Task | None:
        """The next task, of `current` where it has one. In a file's order: the chunks and the hash rely on it."""
        with self._lock:
            while not self.stopping:
                if current is None:
                    current = self._choose()
                    if current is None:
                        return None
                    current.workers += 1
                task = next(current.tasks, None)
                if task is not None:
                    if task.write:
                        current.output.reserve(task.stop)
                    return task
                current.workers -= 1
                if current in self._open_shards:
                    self._open_shards.remove(current)
                current = None
            return None

    def _choose(self) -> ShardWork | None:
        """An unopened shard while there are fewer open ones than workers, else the one with the fewest workers."""
        while self._queue and len(self._open_shards) < self.settings.workers:
            plan = self._queue.popleft()
            if plan.is_copy and self.settings.link != "copy" and self._linked(plan):
                continue
            shard = self._open(plan)
            self._open_shards.append(shard)
            return shard
        return min(self._open_shards, key=lambda shard: shard.workers, default=None)

    def _linked(self, plan: ShardPlan) -> bool:
        assert plan.source is not None
        source = plan.source
        if not link_file(source, self.settings.folder / plan.file, self.settings.link):
            return False

        def hash_it() -> None:
            found = file_sha256(source) if self.settings.hashing else None
            if self.settings.progress is not None:
                self.settings.progress(plan.nbytes)
            self._finished(FinishedShard(plan.file, found, found, {}))

        self._submit(hash_it)
        return True

    def _open(self, plan: ShardPlan) -> ShardWork:
        def done(sha256: str | None) -> None:
            found = shard.digest.hexdigest() if shard.digest is not None else None
            self._finished(FinishedShard(plan.file, sha256, found, shard.figures))

        output = ChunkedFile(
            self.settings.folder / plan.file,
            plan.nbytes,
            self.pool,
            self._submit,
            done,
            self.settings.hashing,
            self.settings.direct,
        )
        shard = ShardWork(plan, output, self.settings.hashing)
        self._made.append(shard)
        output.reserve(len(plan.header))
        output.put(torch.frombuffer(bytearray(plan.header), dtype=torch.uint8), 0)
        shard.tasks = shard.in_order(self._prepare, LOOK_AHEAD * self.settings.workers, self._room)
        return shard

    def _room(self, job: TensorJob) -> bool:
        """True while the forms that are held leave room for this job's."""
        self._prepared = [tensor for tensor in self._prepared if tensor.forms is not None]
        return sum(form_bytes(tensor.job) for tensor in self._prepared) + form_bytes(job) <= AHEAD_BYTES

    def _prepare(self, job: TensorJob, shard: ShardWork) -> TensorWork:
        """A job's blocks; its forms are found on another thread."""
        shape = job.source.shape
        size = math.prod(shape)
        columns = shape[-1] if job.edits else 1
        rows = size // columns if columns else 0
        arithmetic = arithmetic_of(job)
        step = max(1, self.settings.block_bytes // (arithmetic.itemsize * max(columns, 1)))
        dtypes = TORCH_DTYPES[job.source.dtype], arithmetic, TORCH_DTYPES[job.place.dtype]
        tensor = TensorWork(job, shard, rows, columns, step, *dtypes, None, -(-rows // step))
        if job.edits and rows:
            tensor.forms = self._preparers.submit(self._forms, tensor)
            self._prepared.append(tensor)
        return tensor

    def _forms(self, tensor: TensorWork) -> list[BlockEdit]:
        """The forms of a tensor, on the CPU, after the passes over the whole weight that some of them need first."""
        arithmetic = arithmetic_of(tensor.job)
        forms = [edit.stored_edit(arithmetic) for edit in tensor.job.edits]
        for index, form in enumerate(forms):
            while form.needs_pass:  # column norms: Conv1D with DoRA or DuDe
                form = form.with_pass_sums(self._columns(form, tensor, arithmetic))
            forms[index] = form
        return forms

    def _columns(self, form: BlockEdit, tensor: TensorWork, arithmetic: torch.dtype) -> Tensor:
        """The sum of the form's pass_sums over all rows, taken where its blocks will be computed.

        Another kind of device's products differ in their last bits: a threshold found there would miss its own
        element. Of several CUDA devices the first takes all passes.
        """
        if self._passes is None:
            return self._pass(form, tensor, arithmetic)
        try:
            return self._passes.submit(self._pass_on_cuda, form, tensor, arithmetic).result()
        except (RuntimeError, CancelledError):
            if self.stopping:
                raise Stopped from None
            raise

    def _pass_on_cuda(self, form: BlockEdit, tensor: TensorWork, arithmetic: torch.dtype) -> Tensor:
        with current_device(self.settings.device):
            if self._pass_queue is None:
                self._pass_queue = CudaQueue(self.settings.device)
            with self._pass_queue.activate():
                return self._pass(form.to(self.settings.device), tensor, arithmetic)

    def _pass(self, form: BlockEdit, tensor: TensorWork, arithmetic: torch.dtype) -> Tensor:
        source = tensor.job.source
        stored = TORCH_DTYPES[source.dtype]
        row_bytes = tensor.columns * stored.itemsize
        raw = torch.empty(tensor.step * row_bytes, dtype=torch.uint8)
        work = torch.empty(tensor.step, tensor.columns, dtype=arithmetic, device=self.settings.device)
        total: Tensor | None = None
        for start in range(0, tensor.rows, tensor.step):
            if self.stopping:
                raise Stopped
            count = min(tensor.step, tensor.rows - start)
            piece = raw[: count * row_bytes]
            self.sources.read(source, start * row_bytes, piece)
            block = work[:count].copy_(piece.to(self.settings.device).view(stored).view(count, tensor.columns))
            found = form.pass_sums(block, start)
            total = found if total is None else total + found
        assert total is not None
        return total.cpu()
