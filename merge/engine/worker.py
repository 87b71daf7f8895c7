"""Worker of a merge: takes tasks, computes their blocks, checks the results and hands them to the output."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.errors import NumericsError
from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, ITEM_BYTES
from adapter_merge.storage.tensor_io import TORCH_DTYPES, all_finite, holds_finite

from .chunked_file import ChunkPool
from .lanes import Block, Lane, Slot, current_device, is_finite
from .rounding_figures import sampled_rows
from .run_settings import RunSettings
from .schedule import Schedule
from .tasks import ShardWork, Task, TensorWork


@dataclass(slots=True)
class PendingBlock:
    """Block that was launched on the lane and whose result has not been written yet."""

    task: Task
    slot: Slot
    block: Block
    targets: list[Tensor]  # one (rows, columns) of the output dtype, or (n,) uint8 each
    in_place: bool  # the targets are the output's buffers

    def result(self) -> Tensor:
        """Return the result in the output dtype; valid once `slot.mark` is reached."""
        if self.targets[0].dtype == self.block.target:
            return self.targets[0]
        # The pieces may not be aligned to the dtype, so they are copied.
        return torch.cat(self.targets).view(self.block.target)


class Worker:
    """Worker that computes the tasks of a schedule on one lane."""

    def __init__(
        self, lane: Lane, schedule: Schedule, sources: Sources, pool: ChunkPool, settings: RunSettings
    ) -> None:
        self.lane, self.schedule, self.sources, self.pool, self.settings = lane, schedule, sources, pool, settings

    def work(self) -> None:
        """Do tasks until the schedule has none left.

        Raises the error of a task that fails, and Stopped when another worker has failed.
        """
        pending: deque[PendingBlock] = deque()
        with torch.inference_mode(), current_device(self.lane.device):
            try:
                self._loop(pending)
            finally:  # buffers may be freed only when no queue uses them
                for wait in (*(item.slot.mark.synchronize for item in pending), self.lane.wait):
                    with contextlib.suppress(Exception):  # report the first failure, not those that follow from it
                        wait()

    def _loop(self, pending: deque[PendingBlock]) -> None:
        """Take tasks, launch their blocks, and finish the oldest block where no slot is free."""
        lane = self.lane
        free = deque(lane.slots)
        edits_on_device: dict[TensorWork, list[BlockEdit]] = {}
        current: ShardWork | None = None

        def finish_oldest() -> None:
            item = pending.popleft()
            self._finish(item)
            free.append(item.slot)

        while True:
            if self.pool.at_limit:
                while pending:
                    finish_oldest()
                self.pool.wait_until_below_limit()
            task = self.schedule.next(current)
            if task is None:
                break
            current = task.shard
            if not free:
                finish_oldest()
            slot = free.popleft()
            tensor = task.tensor
            if tensor is None:
                self._copy_or_hash(task, slot)
                free.append(slot)
                continue
            self._read(task, slot.bytes("host_in", task.count * tensor.columns * tensor.source.itemsize))
            if tensor not in edits_on_device:
                edits_on_device.clear()
                edits_on_device[tensor] = self._move_edits(tensor, lane)
            block = self._describe_block(task, tensor)
            targets = self._find_targets(task, tensor, slot)
            in_place = bool(targets)
            if not in_place:
                targets = [slot.matrix("host_out", block, block.target)]
            lane.launch(slot, block, edits_on_device[tensor], targets)
            pending.append(PendingBlock(task, slot, block, targets, in_place))
            if slot.on_host:
                finish_oldest()
        while pending and not self.schedule.stopping:
            finish_oldest()

    def _read(self, task: Task, buffer: Tensor) -> None:
        """Read the task's bytes of the input into `buffer` (n,) uint8, and hash them where the task has a turn."""
        source = task.job.source if task.write else task.job.original
        assert source is not None
        first = task.first
        if task.tensor is not None:
            first *= task.tensor.columns * task.tensor.source.itemsize
        self.sources.read(source, first, buffer)
        if task.turn is not None:
            assert task.shard.digest is not None
            task.shard.digest.update(task.turn, buffer)

    def _copy_or_hash(self, task: Task, slot: Slot) -> None:
        """Copy bytes into the output unchanged, or only hash and record bytes that the output does not contain."""
        if not task.write:
            buffer = slot.bytes("host_in", task.count)
            self._read(task, buffer)
            if self.settings.recorder is not None:
                self.settings.recorder.record(task.shard.plan, task.job, task.first, buffer, None)
            self.schedule.finish_part(task.shard)
            return
        offset = task.job.place.start + task.first
        window = task.shard.output.window(offset, 1, task.count, torch.uint8)
        assert window is not None, "a copy never crosses a chunk's end"
        window = window.view(-1)
        self._read(task, window)
        if not self._is_finite(task, window):
            task.shard.not_finite.add(task.job.place.name)
        task.shard.output.mark_filled(offset, task.count)
        if self.settings.progress is not None:
            self.settings.progress(task.count)

    def _is_finite(self, task: Task, window: Tensor) -> bool:
        """Return False for copied bytes that hold NaN or infinity; one pass over (n,) uint8 in the core's cache."""
        source = task.job.source
        if source.dtype not in FLOAT_DTYPES or self.settings.is_delta:
            return True
        size = ITEM_BYTES[source.dtype]
        cut = task.first % size
        head = min(-task.first % size, len(window))
        numbers = window[head : head + (len(window) - head) // size * size]
        if cut:  # the first number begins in the bytes before these
            first = torch.empty(size, dtype=torch.uint8)
            self.sources.read(source, task.first - cut, first)
            numbers = torch.cat((first, numbers))
        elif numbers.storage_offset() % size:
            numbers = numbers.clone()
        return all_finite(numbers.view(TORCH_DTYPES[source.dtype]))

    def _move_edits(self, tensor: TensorWork, lane: Lane) -> list[BlockEdit]:
        """Wait until the tensor's edits are prepared, and return them on the lane's device."""
        if tensor.edits is None:
            return []
        edits = tensor.edits.result()
        if lane.device.type == "cpu":
            return edits
        with lane.compute.activate():
            return [edit.to(lane.device) for edit in edits]

    def _find_targets(self, task: Task, tensor: TensorWork, slot: Slot) -> list[Tensor]:
        """Return the parts of the output's buffers that the result belongs in.

        Empty on the CPU where the result would cross the end of a buffer.
        """
        row_bytes = tensor.columns * tensor.target.itemsize
        offset = task.job.place.start + task.first * row_bytes
        if not slot.on_host:
            return task.shard.output.pieces(offset, task.count * row_bytes)
        window = task.shard.output.window(offset, task.count, tensor.columns, tensor.target)
        return [] if window is None else [window]

    def _describe_block(self, task: Task, tensor: TensorWork) -> Block:
        """Return the description of the task's rows for a lane."""
        measured = 0
        if task.job.edits and not self.settings.is_delta:
            measured = sampled_rows(task.first // tensor.step, tensor.blocks, task.count)
        return Block(
            task.first,
            task.count,
            tensor.columns,
            tensor.source,
            tensor.arithmetic,
            tensor.target,
            self.settings.is_delta,
            measured,
        )

    def _finish(self, pending: PendingBlock) -> None:
        """Wait for a block, check it, and hand it to the output. Raises NumericsError for NaN or infinity."""
        task, slot, block = pending.task, pending.slot, pending.block
        tensor, place = task.tensor, task.job.place
        assert tensor is not None
        slot.mark.synchronize()
        if not is_finite(slot.result_norm, block.target, pending.result):
            hint = "the values may exceed the range of the output dtype: try --dtype bfloat16 or float32"
            if not holds_finite(task.job.source):
                hint = f"the base's own {task.job.source.name} holds NaN or infinity: {task.job.source.file}"
            if not slot.on_host:  # on the CPU the edit itself raises this error
                hint += "; or a row is zero and has a magnitude: is this the base that the adapter was trained on?"
            raise NumericsError(
                f"{place.name}: rows {task.first} .. {task.first + task.count} would hold NaN or infinity", hint=hint
            )
        if (
            self.settings.recorder is not None
            and task.job.source.file == task.shard.plan.source
            and place.name == task.job.source.name
        ):
            row_bytes = tensor.columns * block.source.itemsize
            before = slot.bytes("host_in", task.count * row_bytes)
            after = pending.result().view(torch.uint8).view(-1)
            self.settings.recorder.record(task.shard.plan, task.job, task.first * row_bytes, before, after)
        with tensor.lock:
            if block.measured:
                tensor.totals.add(slot.host_sums, block.measured * tensor.columns)
            tensor.blocks_left -= 1
            if tensor.blocks_left == 0:
                tensor.edits = None
                if task.job.edits and not self.settings.is_delta:
                    task.shard.figures[place.name] = tensor.totals.figures(tensor.rows * tensor.columns)
        row_bytes = tensor.columns * block.target.itemsize
        offset, nbytes = place.start + task.first * row_bytes, task.count * row_bytes
        if pending.in_place:
            task.shard.output.mark_filled(offset, nbytes)
        else:
            task.shard.output.put(slot.bytes("host_out", nbytes), offset)
        if self.settings.progress is not None:
            self.settings.progress(nbytes)
