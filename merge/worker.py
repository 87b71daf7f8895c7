"""One worker: takes tasks, has its lane compute them, checks what comes back and gives it to the output."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from .chunks import ChunkPool
from .edits import BlockEdit
from .errors import NumericsError
from .figures import sampled_rows
from .lanes import Block, Lane, Slot, current_device, is_finite
from .plan import ShardPlan, TensorJob
from .schedule import Progress, Schedule
from .sources import Sources
from .tasks import ShardWork, Task, TensorWork, arithmetic_of
from .tensors import TORCH_DTYPES


class Recorder(Protocol):
    """Keeps what a merge overwrites (preimage.py)."""

    def record(self, shard: ShardPlan, job: TensorJob, first: int, before: Tensor, after: Tensor | None) -> None:
        """Bytes `before` (n,) uint8 from byte `first` of the base's tensor became `after`, or are gone (None)."""


class Worker:
    """A lane, and the blocks that are on their way through it."""

    def __init__(
        self,
        lane: Lane,
        schedule: Schedule,
        sources: Sources,
        pool: ChunkPool,
        *,
        delta: bool,
        progress: Progress | None,
        recorder: Recorder | None,
    ) -> None:
        self.lane, self.schedule, self.sources, self.pool = lane, schedule, sources, pool
        self.delta, self.progress, self.recorder = delta, progress, recorder

    def work(self) -> None:
        """Until there is nothing left to take. Raises what a task raises, and Stopped when another worker failed."""
        flying: deque[tuple[Task, Slot, Tensor, Tensor, bool]] = deque()
        with torch.inference_mode(), current_device(self.lane.device):
            try:
                self._loop(flying)
            finally:  # nothing may be on its way into buffers that are given back
                for _, slot, *_ in flying:
                    with contextlib.suppress(Exception):  # the first failure is the one to tell
                        slot.mark.synchronize()

    def _loop(self, flying: deque[tuple[Task, Slot, Tensor, Tensor, bool]]) -> None:
        lane = self.lane
        free = deque(lane.slots)
        placed: dict[TensorWork, list[BlockEdit]] = {}
        current: ShardWork | None = None

        def land() -> None:
            task, slot, before, after, windowed = flying.popleft()
            self._land(task, slot, before, after, windowed)
            free.append(slot)

        while True:
            if self.pool.crowded:
                while flying:
                    land()
                self.pool.wait_for_room()
            task = self.schedule.next(current)
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
        while flying and not self.schedule.stopping:
            land()

    def _read(self, task: Task, buffer: Tensor) -> None:
        source = task.job.source if task.write else task.job.original
        assert source is not None
        first = task.first
        if task.tensor is not None:
            first *= task.tensor.columns * TORCH_DTYPES[source.dtype].itemsize
        self.sources.read(source, first, buffer)
        if task.turn is not None:
            assert task.shard.digest is not None
            task.shard.digest.update(task.turn, buffer)

    def _pass_bytes(self, task: Task, slot: Slot) -> None:
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

    def _placed_forms(self, tensor: TensorWork, lane: Lane) -> list[BlockEdit]:
        if tensor.forms is None:
            return []
        forms = tensor.forms.result()
        if lane.device.type == "cpu":
            return forms
        with lane.compute.activate():
            return [form.to(lane.device) for form in forms]

    def _target(self, task: Task, slot: Slot, lane: Lane) -> tuple[Tensor, bool]:
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

    def _block(self, task: Task) -> Block:
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
            arithmetic=arithmetic_of(task.job),
            target=TORCH_DTYPES[task.job.place.dtype],
            delta=self.delta,
            measured=measured,
        )

    def _land(self, task: Task, slot: Slot, before: Tensor, after: Tensor, windowed: bool) -> None:
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
        if (
            self.recorder is not None
            and task.job.source.file == task.shard.plan.source
            and place.name == task.job.source.name
        ):
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
