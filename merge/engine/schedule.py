"""Schedule of one run: gives tasks to workers in each file's order, from different shards where possible.

Edits that need work before their first block (an SVD of the base, column norms) are prepared on separate threads, ahead
of the blocks.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_merge.files.hashing import Stopped, file_sha256
from adapter_merge.files.links import link_file
from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.tensor_io import TORCH_DTYPES, holds_finite

from .chunked_file import ChunkedFile, ChunkPool
from .cuda_lanes import CudaQueue
from .lanes import Queue, current_device
from .plan import ShardPlan, TensorJob
from .requantise import collect_figures
from .run_settings import RunSettings
from .tasks import ShardWork, Task, TensorWork, arithmetic_of, estimate_edit_bytes
from .weight_change import WeightChange

LOOK_AHEAD = 2  # tensors per worker whose edits are prepared in advance
AHEAD_BYTES = 64 << 20  # limit of edits that are prepared in advance


@dataclass(frozen=True)
class FinishedShard:
    """Output file that is on the disk."""

    file: str
    sha256: str | None  # of the output; None without hashing
    source_sha256: str | None  # of the base's file, where it was read from end to end
    figures: dict[str, WeightChange]
    not_finite: list[str] = field(default_factory=list)  # copied tensors that hold NaN or infinity


class Schedule:
    """Schedule of the shards of one run; a shard is opened when a worker needs a task.

    submit: runs a function on a writer thread.
    on_finished: called when a shard is on the disk.
    """

    def __init__(
        self,
        shards: Sequence[ShardPlan],
        settings: RunSettings,
        sources: Sources,
        pool: ChunkPool,
        submit: Callable[[Callable[[], None]], None],
        on_finished: Callable[[FinishedShard], None],
    ) -> None:
        self.settings, self.sources, self.pool = settings, sources, pool
        self._submit, self._on_finished = submit, on_finished
        self.stopping = False
        self._queue = deque(shards)
        self._open_shards: list[ShardWork] = []
        self._made: list[ShardWork] = []
        self._prepared: list[TensorWork] = []
        self._lock = threading.Lock()
        # Device memory is planned for one pass at a time, and cuBLAS takes a workspace for each thread.
        self._passes = ThreadPoolExecutor(1, "pass") if settings.device.type == "cuda" else None
        self._pass_queue: Queue | None = None
        self._preparers = ThreadPoolExecutor(settings.workers, "prepare")
        self._threads = [self._preparers] if self._passes is None else [self._preparers, self._passes]

    def stop(self) -> None:
        """Make every worker stop at its next step."""
        with self._lock:
            self.stopping = True
            shards = list(self._made)
        for shard in shards:
            if shard.digest is not None:
                shard.digest.stop()
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)  # do not wait for a decomposition, which may take minutes

    def close(self) -> None:
        """End the threads and close the files, also incomplete ones. Call it once all workers have ended."""
        for threads in self._threads:
            threads.shutdown(cancel_futures=True)
        for shard in self._made:
            shard.output.close()

    def next(self, current: ShardWork | None) -> Task | None:
        """Return the next task, from shard `current` while it has one; None when there are no tasks left.

        Tasks of one file are handed out in its order, which the chunks and the hash rely on.
        """
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
        """Open a shard while fewer are open than there are workers; else return the one with the fewest workers."""
        while self._queue and len(self._open_shards) < self.settings.workers:
            plan = self._queue.popleft()
            if plan.is_copy and self.settings.link != "copy" and self._try_link(plan):
                continue
            shard = self._open(plan)
            self._open_shards.append(shard)
            return shard
        return min(self._open_shards, key=lambda shard: shard.workers, default=None)

    def _try_link(self, plan: ShardPlan) -> bool:
        """Link an unchanged shard to the base's file; False where the file system refuses."""
        assert plan.source is not None
        source = plan.source
        if not link_file(source, self.settings.folder / plan.file, self.settings.link):
            return False

        def hash_and_finish() -> None:
            sha256 = file_sha256(source) if self.settings.hashing else None
            if self.settings.progress is not None:
                self.settings.progress(plan.nbytes)
            not_finite = [] if sha256 is None else [job.place.name for job in plan.jobs if not holds_finite(job.source)]
            self._on_finished(FinishedShard(plan.file, sha256, sha256, {}, sorted(not_finite)))

        self._submit(hash_and_finish)
        return True

    def _open(self, plan: ShardPlan) -> ShardWork:
        """Create the output file, write its header, and prepare its tasks."""

        def finish_output(sha256: str | None) -> None:
            shard.sha256 = sha256
            self.finish_part(shard)

        output = ChunkedFile(
            self.settings.folder / plan.file,
            plan.nbytes,
            self.pool,
            self._submit,
            finish_output,
            self.settings.hashing,
            self.settings.direct,
        )
        shard = ShardWork(plan, output, self.settings.hashing)
        self._made.append(shard)
        output.reserve(len(plan.header))
        output.put(torch.frombuffer(bytearray(plan.header), dtype=torch.uint8), 0)
        shard.tasks = shard.iterate_tasks(self._prepare, LOOK_AHEAD * self.settings.workers, self._may_prepare)
        return shard

    def finish_part(self, shard: ShardWork) -> None:
        """Count the output, or a task that only hashes and records, as finished; the last one ends the shard."""
        if not shard.finish_part():
            return
        source_sha256 = shard.digest.hexdigest() if shard.digest is not None else None
        figures = shard.figures | collect_figures(shard.plan)
        finished = FinishedShard(shard.plan.file, shard.sha256, source_sha256, figures, sorted(shard.not_finite))
        self._on_finished(finished)

    def _may_prepare(self, job: TensorJob) -> bool:
        """Return True where the job's edits and those already prepared take at most AHEAD_BYTES."""
        self._prepared = [tensor for tensor in self._prepared if tensor.edits is not None]
        prepared = sum(estimate_edit_bytes(tensor.job) for tensor in self._prepared)
        return prepared + estimate_edit_bytes(job) <= AHEAD_BYTES

    def _prepare(self, job: TensorJob, shard: ShardWork) -> TensorWork:
        """Split a job into blocks, and start to prepare its edits on another thread."""
        shape = job.source.shape
        size = math.prod(shape)
        columns = shape[-1] if job.edits or isinstance(job.source, ComputedRef) else 1
        rows = size // columns if columns else 0
        arithmetic = arithmetic_of(job)
        step = max(1, self.settings.block_bytes // (arithmetic.itemsize * max(columns, 1)))
        dtypes = TORCH_DTYPES[job.source.dtype], arithmetic, TORCH_DTYPES[job.place.dtype]
        tensor = TensorWork(job, shard, rows, columns, step, *dtypes, None, -(-rows // step))
        if job.edits and rows:
            tensor.edits = self._preparers.submit(self._prepare_edits, tensor)
            self._prepared.append(tensor)
        return tensor

    def _prepare_edits(self, tensor: TensorWork) -> list[BlockEdit]:
        """Return the edits of a tensor, on the CPU, after the passes over the whole weight that some of them need."""
        arithmetic = arithmetic_of(tensor.job)
        edits = [module.stored_edit(arithmetic) for module in tensor.job.edits]
        for index, edit in enumerate(edits):
            while edit.needs_pass:  # column norms (Conv1D with DoRA or DuDe), thresholds of TIES
                edit = edit.with_pass_sums(self._sum_over_weight(edit, tensor, arithmetic))
            edits[index] = edit
        return edits

    def _sum_over_weight(self, edit: BlockEdit, tensor: TensorWork, arithmetic: torch.dtype) -> Tensor:
        """Return the total of the edit's `pass_sums` over all rows, computed on the kind of device that merges them.

        The products of another kind of device differ in their last bits, so that a threshold computed there would not
        equal the element from which it was taken. The first of several CUDA devices runs all passes.
        """
        if self._passes is None:
            return self._run_pass(edit, tensor, arithmetic)
        try:
            return self._passes.submit(self._run_pass_on_cuda, edit, tensor, arithmetic).result()
        except (RuntimeError, CancelledError):
            if self.stopping:
                raise Stopped from None
            raise

    def _run_pass_on_cuda(self, edit: BlockEdit, tensor: TensorWork, arithmetic: torch.dtype) -> Tensor:
        """Return the result of `_run_pass`, computed on the run's first CUDA device in a stream of its own."""
        with current_device(self.settings.device):
            if self._pass_queue is None:
                self._pass_queue = CudaQueue(self.settings.device)
            with self._pass_queue.activate():
                return self._run_pass(edit.to(self.settings.device), tensor, arithmetic)

    def _run_pass(self, edit: BlockEdit, tensor: TensorWork, arithmetic: torch.dtype) -> Tensor:
        """Read the weight block by block and add up the edit's `pass_sums`; returns the total on the CPU."""
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
            sums = edit.pass_sums(block, start)
            total = sums if total is None else total + sums
        assert total is not None
        return total.cpu()
