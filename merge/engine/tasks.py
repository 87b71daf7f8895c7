"""The steps of a merge in the order of a file's bytes: what one worker does between two looks at the schedule."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.storage.hashing import OrderedDigest

from .chunked_file import CHUNK_BYTES, ChunkedFile
from .plan import ShardPlan, TensorJob
from .rounding_figures import FigureTotals, TensorFigures

CAST_BYTES = 1 << 19


def arithmetic_of(job: TensorJob) -> torch.dtype:
    """What the job's blocks are computed in."""
    return torch.float64 if job.source.dtype == "F64" else torch.float32


def form_bytes(job: TensorJob) -> int:
    """About what the job's forms take: the factors of every adapter's every edit."""
    if not job.edits:
        return 0
    columns = job.source.shape[-1]
    rows = math.prod(job.source.shape[:-1])
    rank = sum(edit.module.factor_rank for edit in job.edits)
    return rank * (rows + columns) * arithmetic_of(job).itemsize


@dataclass(eq=False)
class TensorWork:
    """One job's blocks and what they have found so far."""

    job: TensorJob
    shard: ShardWork
    rows: int
    columns: int
    step: int  # rows in a block
    source: torch.dtype
    arithmetic: torch.dtype
    target: torch.dtype
    forms: Future[list[BlockEdit]] | None
    left: int  # blocks to finish
    totals: FigureTotals = field(default_factory=FigureTotals)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.step)


@dataclass(slots=True, eq=False)
class Task:
    """One step of a worker: rows of an edited or cast tensor, bytes of a copied one, or bytes only to be hashed."""

    shard: ShardWork
    job: TensorJob
    tensor: TensorWork | None  # None: bytes
    first: int  # row, or byte of the tensor
    count: int
    turn: int | None  # place in the order in which the input is hashed; None: not hashed
    write: bool = True

    @property
    def stop(self) -> int:
        """The output's byte after the task's last."""
        start = self.job.place.start
        if self.tensor is None:
            return start + self.first + self.count
        return start + (self.first + self.count) * self.tensor.columns * self.tensor.target.itemsize


class ShardWork:
    """One output file in work."""

    def __init__(self, plan: ShardPlan, output: ChunkedFile, hashing: bool) -> None:
        self.plan, self.output = plan, output
        self.digest = OrderedDigest() if hashing and plan.source is not None else None
        self.turns = 0
        self.tasks: Iterator[Task] = iter(())
        self.workers = 0
        self.figures: dict[str, TensorFigures] = {}
        turn = self.next_turn()
        if self.digest is not None and turn is not None:
            self.digest.update(turn, plan.source_header)

    def next_turn(self) -> int | None:
        """The next piece's place in the input's hash; None where the input is not hashed."""
        if self.digest is None:
            return None
        self.turns += 1
        return self.turns - 1

    def in_order(
        self,
        prepare: Callable[[TensorJob, ShardWork], TensorWork],
        ahead: int,
        room: Callable[[TensorJob], bool],
    ) -> Iterator[Task]:
        """Every task of the shard, in the order of its bytes. prepare: called up to `ahead` jobs early."""
        jobs = self.plan.jobs
        tensors: dict[int, TensorWork] = {}
        for index, job in enumerate(jobs):
            for coming in range(index, min(len(jobs), index + 1 + ahead)):
                if not jobs[coming].is_copy and coming not in tensors:
                    if coming > index and not room(jobs[coming]):
                        break
                    tensors[coming] = prepare(jobs[coming], self)
            hashed = self.plan.source is not None
            if job.original is not None:
                for first in range(0, job.original.nbytes, CAST_BYTES):
                    count = min(CAST_BYTES, job.original.nbytes - first)
                    yield Task(self, job, None, first, count, self.next_turn(), write=False)
                hashed = False
            hashed = hashed and job.source.file == self.plan.source and job.place.name == job.source.name
            if job.is_copy:
                first = 0
                while first < job.place.nbytes:  # up to a chunk's end: read straight into the chunk
                    rest = CHUNK_BYTES - (job.place.start + first) % CHUNK_BYTES
                    count = min(CAST_BYTES, rest, job.place.nbytes - first)
                    yield Task(self, job, None, first, count, self.next_turn() if hashed else None)
                    first += count
            else:
                tensor = tensors.pop(index)
                for first in range(0, tensor.rows, tensor.step):
                    count = min(tensor.step, tensor.rows - first)
                    yield Task(self, job, tensor, first, count, self.next_turn() if hashed else None)
