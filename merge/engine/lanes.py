"""Where blocks are computed: slots of reused buffers, and the queues (CUDA streams) that fill and empty them.

One code path for both devices. A slot's block goes

    host_in -> upload -> float32 -> the forms -> round once -> download -> the output's own buffers

On the CPU the device buffers are the host buffers, upload and download do nothing, and every step is done when it
returns. On CUDA (cuda_lanes.py) each arrow runs on its own stream and waits for the one before it by an event, so that
the blocks of a lane's slots overlap: while one is computed, the next is uploaded and the last downloaded. Host buffers
are pinned, those of the output as well.
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

CPU_BLOCK_BYTES = 1 << 20  # of float32: smaller ones stay in a second-level cache, but wait for the interpreter more


class Mark(Protocol):
    """A point in a queue's work (a CUDA event)."""

    def synchronize(self) -> None:
        """Wait on the host until the queue has come here."""


class Queue(Protocol):
    """Work in order (a CUDA stream)."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Work launched inside goes to this queue."""

    def mark(self) -> Mark:
        """Here."""

    def wait(self, mark: Mark) -> None:
        """What comes next in this queue waits for `mark`; the host does not."""


class Done:
    """The mark of work that is done when its call returns."""

    def synchronize(self) -> None:
        pass


class Inline:
    """The CPU's queue: every call is done when it returns."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return Done()

    def wait(self, mark: Mark) -> None:
        pass


@dataclass(slots=True)
class Block:
    """What is to be done to some rows of one tensor."""

    start: int  # first row
    rows: int
    columns: int
    source: torch.dtype
    arithmetic: torch.dtype  # float32, or float64 for a float64 source
    target: torch.dtype
    delta: bool  # dW instead of W'
    measured: int  # of how many rows, the first ones, to take figures

    @property
    def elements(self) -> int:
        return self.rows * self.columns


class Slot:
    """The buffers of one block, grown to the largest it has met: host_in, in, work, spare, out; on the CPU host_out.

    Views are kept: every call into torch lets go of the interpreter's lock, and two workers that each make a dozen
    views of a block spend a third of their time waiting for each other.
    """

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.device, self.pinned = device, pinned
        self.on_host = device.type == "cpu"
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}
        self.sums = torch.empty(SUMS, dtype=torch.float32, device=device)
        self.host_sums = self.sums if self.on_host else self._host_floats(SUMS)
        self.norm = torch.empty((), dtype=torch.float32, device=device)
        self.host_norm = self.norm if self.on_host else self._host_floats(1).view(())
        self._norm: numpy.ndarray[Any, Any] | None = None  # the same memory
        self.mark: Mark = Done()

    def _host_floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, pin_memory=self.pinned)

    def bytes(self, name: str, nbytes: int) -> Tensor:
        """(nbytes,) uint8: of host memory for host_in (what was read) and host_out (what is to be written)."""
        view = self._views.get((name, nbytes))
        if view is None:
            held = self._buffers.get(name)
            if held is None or held.numel() < nbytes:
                self._views = {key: view for key, view in self._views.items() if key[0] != name}
                held = (
                    torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)
                    if name.startswith("host")
                    else torch.empty(nbytes, dtype=torch.uint8, device=self.device)
                )
                self._buffers[name] = held
            view = self._views[name, nbytes] = held[:nbytes]
        return view

    def matrix(self, name: str, block: Block, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of `dtype`: the same bytes."""
        key = (name, block.rows, block.columns, dtype)
        view = self._views.get(key)
        if view is None:
            flat = self.bytes(name, block.elements * dtype.itemsize)
            view = self._views[key] = flat.view(dtype).view(block.rows, block.columns)
        return view

    @property
    def norm_found(self) -> float:
        """The norm of the last result before rounding, once `mark` has come."""
        if self._norm is None:
            self._norm = self.host_norm.numpy()
        return float(self._norm)


@dataclass(frozen=True)
class Lane:
    """One worker's slots and queues on one device."""

    device: torch.device
    slots: tuple[Slot, ...]
    upload: Queue
    compute: Queue
    download: Queue
    block_bytes: int  # of float32 in one block

    def wait(self) -> None:
        """Until nothing is on its way."""
        for queue in (self.upload, self.compute, self.download):
            queue.mark().synchronize()

    def launch(
        self,
        slot: Slot,
        block: Block,
        forms: Sequence[BlockEdit],
        targets: Sequence[Tensor],  # on the CPU one (rows, columns) of the output dtype; from a device (n,) uint8 each
    ) -> None:
        """Start the block's way from the slot's host_in to `targets`, in turn; `slot.mark` is where it ends.

        `slot.norm_found` is then the norm of the result before rounding, `slot.host_sums` what block_sums found.
        """
        if not slot.on_host:
            nbytes = block.elements * block.source.itemsize
            with self.upload.activate():
                slot.bytes("in", nbytes).copy_(slot.bytes("host_in", nbytes), non_blocking=True)
                uploaded = self.upload.mark()
            self.compute.wait(uploaded)
        with self.compute.activate():  # what is allocated here is this queue's: another one's may still be in use
            if slot.on_host:
                before, stored = slot.matrix("host_in", block, block.source), targets[0]
            else:
                before, stored = slot.matrix("in", block, block.source), slot.matrix("out", block, block.target)
            work = slot.matrix("work", block, block.arithmetic)
            work.copy_(before)
            if block.delta:
                result = _delta(work, forms, block.start)
            else:
                result = work
                for form in forms:
                    form.apply_(result, block.start)
            stored.copy_(result)
            if block.arithmetic == slot.norm.dtype:
                torch.linalg.vector_norm(result, out=slot.norm)
            else:
                slot.norm.copy_(torch.linalg.vector_norm(result))
            if block.measured:
                few = slice(block.measured)
                spare = slot.matrix("spare", block, block.arithmetic)
                block_sums(before[few], result[few], stored[few], spare[few], slot.sums)
            computed = self.compute.mark()
        if slot.on_host:
            slot.mark = computed
            return
        self.download.wait(computed)
        with self.download.activate():
            rest = slot.bytes("out", block.elements * block.target.itemsize)
            for target in targets:
                target.copy_(rest[: target.numel()], non_blocking=True)
                rest = rest[target.numel() :]
            slot.host_norm.copy_(slot.norm, non_blocking=True)
            if block.measured:
                slot.host_sums.copy_(slot.sums, non_blocking=True)
            slot.mark = self.download.mark()


def _delta(block: Tensor, forms: Sequence[BlockEdit], start: int) -> Tensor:
    """Rows of dW; of one form without the difference of two large numbers where that can be avoided."""
    if len(forms) == 1:
        return forms[0].delta_rows(block, start)
    after = block.clone()
    for form in forms:
        form.apply_(after, start)
    return after.sub_(block)


def is_finite(
    norm: float,  # of the result before rounding: no element is larger
    dtype: torch.dtype,  # of the output
    stored: Callable[[], Tensor],  # the rounded result, on the host
) -> bool:
    """True when no element of the result is NaN or infinite."""
    return norm < torch.finfo(dtype).max or all_finite(stored())


def cpu_lane() -> Lane:
    """A worker's lane on the CPU: one block at a time."""
    device = torch.device("cpu")
    inline = Inline()
    return Lane(device, (Slot(device, False),), inline, inline, inline, CPU_BLOCK_BYTES)


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`device` is the calling thread's own inside: every thread begins on the first one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


LaneMaker = Callable[[], Lane]
