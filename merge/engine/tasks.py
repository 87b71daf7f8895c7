"""Tasks of a merge: the steps of one output file, in the order of its bytes, of which a worker takes one at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from adapter_merge.files.hashing import OrderedDigest
from adapter_merge.methods.block_edits import BlockEdit

from .chunked_file import CHUNK_BYTES, ChunkedFile
from .plan import ShardPlan, TensorJob
from .rounding_figures import FigureTotals
from .weight_change import WeightChange

CAST_BYTES = 1 << 19  # at most, of one task that copies or only hashes bytes


def arithmetic_of(job: TensorJob) -> torch.dtype:
    """Return the dtype in which the job's blocks are computed: float64 for a float64 source, else float32."""
    return torch.float64 if job.source.dtype == "F64" else torch.float32


def estimate_edit_bytes(job: TensorJob) -> int:
    """Estimate the bytes of the factors of all edits of the job."""
    if not job.edits:
        return 0
    columns = job.source.shape[-1]
    rows = math.prod(job.source.shape[:-1])
    rank = sum(edit.module.factor_rank for edit in job.edits)
    return rank * (rows + columns) * arithmetic_of(job).itemsize


@dataclass(eq=False)
class TensorWork:
    """One job in progress: its division into blocks, and their figures so far."""

    job: TensorJob
    shard: ShardWork
    rows: int
    columns: int
    step: int  # rows per block
    source: torch.dtype
    arithmetic: torch.dtype
    target: torch.dtype
    edits: Future[list[BlockEdit]] | None  # None: the job has none, or all blocks are finished
    blocks_left: int  # blocks that are not finished
    totals: FigureTotals = field(default_factory=FigureTotals)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.step)


@dataclass(slots=True, eq=False)
class Task:
    """One step of a worker: rows of an edited or cast tensor, bytes of a copied one, or bytes that are only hashed."""

    shard: ShardWork
    job: TensorJob
    tensor: TensorWork | None  # None: bytes are copied or hashed
    first: int  # row of the tensor; where `tensor` is None, byte of it
    count: int  # of rows, or of bytes
    turn: int | None  # position in the order in which the input is hashed; None: not hashed
    write: bool = True  # False: only hash and record

    @property
    def stop(self) -> int:
        """Offset in the output file of the byte after the task's last one."""
        start = self.job.place.start
        if self.tensor is None:
            return start + self.first + self.count
        return start + (self.first + self.count) * self.tensor.columns * self.tensor.target.itemsize


class ShardWork:
    """Output file in progress."""

    def __init__(self, plan: ShardPlan, output: ChunkedFile, hashing: bool) -> None:
        self.plan, self.output = plan, output
        self.digest = OrderedDigest() if hashing and plan.source is not None else None
        self.turns = 0
        self.tasks: Iterator[Task] = iter(())
        self.workers = 0
        self.figures: dict[str, WeightChange] = {}
        self.not_finite: set[str] = set()  # copied tensors that hold NaN or infinity
        self.sha256: str | None = None  # of the output, once it is on the disk
        originals = (job.original.nbytes for job in plan.jobs if job.original is not None)
        self._unfinished = 1 + sum(-(-nbytes // CAST_BYTES) for nbytes in originals)
        self._lock = threading.Lock()
        turn = self.next_turn()
        if self.digest is not None and turn is not None:
            self.digest.update(turn, plan.source_header)

    def finish_part(self) -> bool:
        """Count the output, or a task that only hashes and records, as finished; return True after the last of them.

        The output may be on the disk while another worker still hashes bytes of the input that it does not contain.
        """
        with self._lock:
            self._unfinished -= 1
            return self._unfinished == 0

    def next_turn(self) -> int | None:
        """Return the position of the next piece in the input's hash; None where the input is not hashed."""
        if self.digest is None:
            return None
        self.turns += 1
        return self.turns - 1

    def iterate_tasks(
        self,
        prepare: Callable[[TensorJob, ShardWork], TensorWork],
        ahead: int,
        may_prepare: Callable[[TensorJob], bool],
    ) -> Iterator[Task]:
        """Yield all tasks of the shard in the order of its bytes.

        prepare: called for up to `ahead` jobs before their turn, while `may_prepare` allows it.
        """
        jobs = self.plan.jobs
        tensors: dict[int, TensorWork] = {}
        for index, job in enumerate(jobs):
            for upcoming in range(index, min(len(jobs), index + 1 + ahead)):
                if not jobs[upcoming].is_copy and upcoming not in tensors:
                    if upcoming > index and not may_prepare(jobs[upcoming]):
                        break
                    tensors[upcoming] = prepare(jobs[upcoming], self)
            hashed = self.plan.source is not None
            if job.original is not None:
                for first in range(0, job.original.nbytes, CAST_BYTES):
                    count = min(CAST_BYTES, job.original.nbytes - first)
                    yield Task(self, job, None, first, count, self.next_turn(), write=False)
                hashed = False
            hashed = hashed and job.source.file == self.plan.source and job.place.name == job.source.name
            if job.is_copy:
                first = 0
                while first < job.place.nbytes:  # never across a chunk's end, so that a worker can read into the chunk
                    chunk_left = CHUNK_BYTES - (job.place.start + first) % CHUNK_BYTES
                    count = min(CAST_BYTES, chunk_left, job.place.nbytes - first)
                    yield Task(self, job, None, first, count, self.next_turn() if hashed else None)
                    first += count
            else:
                tensor = tensors.pop(index)
                for first in range(0, tensor.rows, tensor.step):
                    count = min(tensor.step, tensor.rows - first)
                    yield Task(self, job, tensor, first, count, self.next_turn() if hashed else None)
