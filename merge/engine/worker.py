"""One worker: takes tasks, has its lane compute them, checks what comes back and gives it to the output."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_merge.errors import NumericsError
from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.storage.input_files import Sources

from .chunked_file import ChunkPool
from .devices import set_own_threads
from .lanes import Block, Lane, Slot, current_device, is_finite
from .rounding_figures import sampled_rows
from .run_settings import RunSettings
from .schedule import Schedule
from .tasks import ShardWork, Task, TensorWork


@dataclass(slots=True)
class Flight:
    """A block on its way."""

    task: Task
    slot: Slot
    block: Block
    targets: list[Tensor]  # one (rows, columns) of the output dtype, or bytes in pieces
    in_place: bool  # the targets are the output's own buffers

    def stored(self) -> Tensor:
        """The result in the output dtype, once `slot.mark` has come."""
        if self.targets[0].dtype == self.block.target:
            return self.targets[0]
        return torch.cat(self.targets).view(self.block.target)  # a copy: pieces may lie at odd bytes


class Worker:
    """A lane, and the blocks that are on their way through it."""

    def __init__(
        self, lane: Lane, schedule: Schedule, sources: Sources, pool: ChunkPool, settings: RunSettings
    ) -> None:
        self.lane, self.schedule, self.sources, self.pool, self.settings = lane, schedule, sources, pool, settings

    def work(self) -> None:
        """Until there is nothing left to take. Raises what a task raises, and Stopped when another worker failed."""
        flying: deque[Flight] = deque()
        set_own_threads(1)  # a product's threads are the calling thread's own setting
        with torch.inference_mode(), current_device(self.lane.device):
            try:
                self._loop(flying)
            finally:  # nothing may be on its way into buffers that are given back
                for wait in (*(flight.slot.mark.synchronize for flight in flying), self.lane.wait):
                    with contextlib.suppress(Exception):  # the first failure is the one to tell
                        wait()

    def _loop(self, flying: deque[Flight]) -> None:
        lane = self.lane
        free = deque(lane.slots)
        placed: dict[TensorWork, list[BlockEdit]] = {}
        current: ShardWork | None = None

        def land() -> None:
            flight = flying.popleft()
            self._land(flight)
            free.append(flight.slot)

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
            tensor = task.tensor
            if tensor is None:
                self._pass_bytes(task, slot)
                free.append(slot)
                continue
            self._read(task, slot.bytes("host_in", task.count * tensor.columns * tensor.source.itemsize))
            if tensor not in placed:
                placed.clear()
                placed[tensor] = self._placed_forms(tensor, lane)
            block = self._block(task, tensor)
            targets = self._targets(task, tensor, slot)
            in_place = bool(targets)
            if not in_place:
                targets = [slot.matrix("host_out", block, block.target)]
            lane.launch(slot, block, placed[tensor], targets)
            flying.append(Flight(task, slot, block, targets, in_place))
            if slot.on_host:
                land()
        while flying and not self.schedule.stopping:
            land()

    def _read(self, task: Task, buffer: Tensor) -> None:
        source = task.job.source if task.write else task.job.original
        assert source is not None
        first = task.first
        if task.tensor is not None:
            first *= task.tensor.columns * task.tensor.source.itemsize
        self.sources.read(source, first, buffer)
        if task.turn is not None:
            assert task.shard.digest is not None
            task.shard.digest.update(task.turn, buffer)

    def _pass_bytes(self, task: Task, slot: Slot) -> None:
        """Copy, or only hash and record, bytes that are not computed with."""
        if not task.write:
            buffer = slot.bytes("host_in", task.count)
            self._read(task, buffer)
            if self.settings.recorder is not None:
                self.settings.recorder.record(task.shard.plan, task.job, task.first, buffer, None)
            return
        offset = task.job.place.start + task.first
        window = task.shard.output.window(offset, 1, task.count, torch.uint8)
        assert window is not None, "copies end where chunks end"
        window = window.view(-1)
        self._read(task, window)
        task.shard.output.filled(offset, task.count)
        if self.settings.progress is not None:
            self.settings.progress(task.count)

    def _placed_forms(self, tensor: TensorWork, lane: Lane) -> list[BlockEdit]:
        if tensor.forms is None:
            return []
        forms = tensor.forms.result()
        if lane.device.type == "cpu":
            return forms
        with lane.compute.activate():
            return [form.to(lane.device) for form in forms]

    def _targets(self, task: Task, tensor: TensorWork, slot: Slot) -> list[Tensor]:
        """The result's place in the output's own buffers; none where the CPU's does not lie in one of them."""
        row_bytes = tensor.columns * tensor.target.itemsize
        offset = task.job.place.start + task.first * row_bytes
        if not slot.on_host:
            return task.shard.output.pieces(offset, task.count * row_bytes)
        window = task.shard.output.window(offset, task.count, tensor.columns, tensor.target)
        return [] if window is None else [window]

    def _block(self, task: Task, tensor: TensorWork) -> Block:
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

    def _land(self, flight: Flight) -> None:
        """Wait for a block, check it, and give it to the output."""
        task, slot, block = flight.task, flight.slot, flight.block
        tensor, place = task.tensor, task.job.place
        assert tensor is not None
        slot.mark.synchronize()
        if not is_finite(slot.norm_found, block.target, flight.stored):
            hint = "values beyond the output dtype's range: try --dtype bfloat16 or float32"
            if not slot.on_host:  # the CPU would have told this by itself
                hint += "; or a row that is zero but has a magnitude: is this the base that was trained on?"
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
            after = flight.stored().view(torch.uint8).view(-1)
            self.settings.recorder.record(task.shard.plan, task.job, task.first * row_bytes, before, after)
        with tensor.lock:
            if block.measured:
                tensor.totals.add(slot.host_sums, block.measured * tensor.columns)
            tensor.left -= 1
            if tensor.left == 0:
                tensor.forms = None
                if task.job.edits and not self.settings.is_delta:
                    task.shard.figures[place.name] = tensor.totals.figures(tensor.rows * tensor.columns)
        row_bytes = tensor.columns * block.target.itemsize
        offset, nbytes = place.start + task.first * row_bytes, task.count * row_bytes
        if flight.in_place:
            task.shard.output.filled(offset, nbytes)
        else:
            task.shard.output.put(slot.bytes("host_out", nbytes), offset)
        if self.settings.progress is not None:
            self.settings.progress(nbytes)
