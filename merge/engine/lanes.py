"""Computation of blocks: slots of reused buffers, and the queues (CUDA streams) that work on them.

The CPU and CUDA use the same code. The block of a slot takes these steps:

    host_in -> upload -> float32 -> apply the edits -> round once -> download -> the output's buffers

On the CPU the device buffers are the host buffers, there is no upload or download, and each step has ended when its
call returns. On CUDA (cuda_lanes.py) upload, computation and download run on one stream each and wait for each other by
events, so that the blocks of a lane's slots overlap: while one is computed, the next is uploaded and the previous one
downloaded. Host buffers are pinned, including those of the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from adapter_merge.methods.block_edits import BlockEdit
from adapter_merge.storage.tensor_io import all_finite

from .rounding_figures import SUMS, block_sums

if TYPE_CHECKING:
    import numpy

CPU_BLOCK_BYTES = 1 << 20  # of float32; smaller blocks would fit the L2 cache, but wait longer for the interpreter lock


class Mark(Protocol):
    """Point in the work of a queue (a CUDA event)."""

    def synchronize(self) -> None:
        """Make the host wait until the queue has reached this point."""


class Queue(Protocol):
    """Queue of work that runs in order (a CUDA stream)."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Send work that is launched inside the `with` block to this queue."""

    def mark(self) -> Mark:
        """Return a mark after all work that this queue has been given so far."""

    def wait(self, mark: Mark) -> None:
        """Make work added to this queue from now on wait for `mark`; the host does not wait."""


class Done:
    """Mark of work that has ended when its call returns."""

    def synchronize(self) -> None:
        pass


class Inline:
    """Queue of the CPU: all work has ended when its call returns."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return Done()

    def wait(self, mark: Mark) -> None:
        pass


@dataclass(slots=True)
class Block:
    """Description of the work on some rows of one tensor."""

    start: int  # first row in the tensor
    rows: int
    columns: int
    source: torch.dtype
    arithmetic: torch.dtype  # float32, or float64 for a float64 source
    target: torch.dtype
    delta: bool  # write dW instead of W'
    measured: int  # number of rows, from the first, that figures are measured on

    @property
    def elements(self) -> int:
        return self.rows * self.columns


class Slot:
    """Buffers of one block: host_in, in, work, spare, out, and on the CPU host_out. Each grows to the largest block.

    Views are cached: every call into torch releases the interpreter lock, and two workers that each made a dozen views
    per block would spend a third of their time waiting for each other.
    """

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.device, self.pinned = device, pinned
        self.on_host = device.type == "cpu"
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}
        self.sums = torch.empty(SUMS, dtype=torch.float32, device=device)
        self.host_sums = self.sums if self.on_host else self._allocate_host_floats(SUMS)
        self.norm = torch.empty((), dtype=torch.float32, device=device)
        self.host_norm = self.norm if self.on_host else self._allocate_host_floats(1).view(())
        self._norm: numpy.ndarray[Any, Any] | None = None  # numpy's view of host_norm
        self.mark: Mark = Done()

    def _allocate_host_floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, pin_memory=self.pinned)

    def bytes(self, name: str, nbytes: int) -> Tensor:
        """Return (nbytes,) uint8 of the named buffer, which is in host memory for host_in and host_out."""
        view = self._views.get((name, nbytes))
        if view is None:
            buffer = self._buffers.get(name)
            if buffer is None or buffer.numel() < nbytes:
                self._views = {key: view for key, view in self._views.items() if key[0] != name}
                buffer = (
                    torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)
                    if name.startswith("host")
                    else torch.empty(nbytes, dtype=torch.uint8, device=self.device)
                )
                self._buffers[name] = buffer
            view = self._views[name, nbytes] = buffer[:nbytes]
        return view

    def matrix(self, name: str, block: Block, dtype: torch.dtype) -> Tensor:
        """Return the named buffer as (rows, columns) of `dtype`, for this block."""
        key = (name, block.rows, block.columns, dtype)
        view = self._views.get(key)
        if view is None:
            flat = self.bytes(name, block.elements * dtype.itemsize)
            view = self._views[key] = flat.view(dtype).view(block.rows, block.columns)
        return view

    @property
    def result_norm(self) -> float:
        """Norm of the last result before rounding; valid once `mark` is reached."""
        if self._norm is None:
            self._norm = self.host_norm.numpy()
        return float(self._norm)


@dataclass(frozen=True)
class Lane:
    """Slots and queues of one worker on one device."""

    device: torch.device
    slots: tuple[Slot, ...]
    upload: Queue
    compute: Queue
    download: Queue
    block_bytes: int  # of float32 in one block

    def wait(self) -> None:
        """Wait until all queues have done their work."""
        for queue in (self.upload, self.compute, self.download):
            queue.mark().synchronize()

    def launch(
        self,
        slot: Slot,
        block: Block,
        edits: Sequence[BlockEdit],
        targets: Sequence[Tensor],  # on the CPU one (rows, columns) of the output dtype; from a device (n,) uint8 each
    ) -> None:
        """Start the work on one block, from the slot's host_in to `targets`, and set `slot.mark` to its end.

        Several targets are filled one after the other. Once the mark is reached, `slot.result_norm` is the norm of the
        result before rounding, and `slot.host_sums` holds the sums of `block_sums` where `block.measured` is not 0.
        """
        if not slot.on_host:
            nbytes = block.elements * block.source.itemsize
            with self.upload.activate():
                slot.bytes("in", nbytes).copy_(slot.bytes("host_in", nbytes), non_blocking=True)
                uploaded = self.upload.mark()
            self.compute.wait(uploaded)
        with self.compute.activate():  # the allocator reuses memory per stream: temporaries must belong to this one
            if slot.on_host:
                before, stored = slot.matrix("host_in", block, block.source), targets[0]
            else:
                before, stored = slot.matrix("in", block, block.source), slot.matrix("out", block, block.target)
            work = slot.matrix("work", block, block.arithmetic)
            work.copy_(before)
            if block.delta:
                result = _compute_delta(work, edits, block.start)
            else:
                result = work
                for edit in edits:
                    edit.apply_(result, block.start)
            stored.copy_(result)
            if block.arithmetic == slot.norm.dtype:
                torch.linalg.vector_norm(result, out=slot.norm)
            else:
                slot.norm.copy_(torch.linalg.vector_norm(result))
            if block.measured:
                measured = slice(block.measured)
                spare = slot.matrix("spare", block, block.arithmetic)
                block_sums(before[measured], result[measured], stored[measured], spare[measured], slot.sums)
            computed = self.compute.mark()
        if slot.on_host:
            slot.mark = computed
            return
        self.download.wait(computed)
        with self.download.activate():
            remaining = slot.bytes("out", block.elements * block.target.itemsize)
            for target in targets:
                target.copy_(remaining[: target.numel()], non_blocking=True)
                remaining = remaining[target.numel() :]
            slot.host_norm.copy_(slot.norm, non_blocking=True)
            if block.measured:
                slot.host_sums.copy_(slot.sums, non_blocking=True)
            slot.mark = self.download.mark()


def _compute_delta(block: Tensor, edits: Sequence[BlockEdit], start: int) -> Tensor:
    """Return rows of dW (n, columns); a single edit avoids W' - W0, a difference of large numbers, where it can."""
    if len(edits) == 1:
        return edits[0].delta_rows(block, start)
    after = block.clone()
    for edit in edits:
        edit.apply_(after, start)
    return after.sub_(block)


def is_finite(
    norm: float,  # of the result before rounding: no element is larger
    dtype: torch.dtype,  # of the output
    stored: Callable[[], Tensor],  # the rounded result, on the host
) -> bool:
    """Tell whether every element of the result is finite."""
    return norm < torch.finfo(dtype).max or all_finite(stored())


def cpu_lane() -> Lane:
    """Make one worker's lane on the CPU, which has one block at a time."""
    device = torch.device("cpu")
    inline = Inline()
    return Lane(device, (Slot(device, False),), inline, inline, inline, CPU_BLOCK_BYTES)


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the calling thread's current device inside the `with` block; new threads begin on device 0."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


LaneMaker = Callable[[], Lane]
