"""The lanes of CUDA devices: their streams, and how much of a device's memory they may take.

A device computes a block a hundred times faster than a host thread can read, hash and write it. What a merge takes is
then host work, so each device has several workers, whose blocks are small: 8 MB cross PCIe as fast as 32 do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapter_merge.errors import InputError

from .lanes import Lane, LaneMaker, Mark, Slot, current_device
from .plan import ShardPlan
from .tasks import arithmetic_of, form_bytes

BLOCK_BYTES = 8 << 20  # of float32
LEAST_BYTES = 1 << 16
DEPTH = 3
WORKERS = 2  # on each device: one reads while the other's blocks are written; six took more than twice as long
HASHING_WORKERS = 4  # files are hashed side by side, each by the worker that reads it
VRAM_FRACTION = 0.25
BLOCKS_PER_SLOT = 4  # input, work, spare, output
TEMPORARY_BLOCKS = 8  # what a form makes meanwhile
BLOCKS_PER_SHARE = 12  # the same for each adapter of a combination: its delta, sizes as int64, its part of the stack
FORMS_HELD = 2  # on a device, by each worker: those in use, and those before them that the allocator still keeps


class CudaQueue:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def mark(self) -> Mark:
        mark: Mark = self.stream.record_event()
        return mark

    def wait(self, mark: Mark) -> None:
        self.stream.wait_event(mark)  # type: ignore[arg-type]


def cuda_lane(device: torch.device, block_bytes: int) -> Lane:
    """A worker's lane on a CUDA device."""
    with current_device(device):
        upload, compute, download = (CudaQueue(device) for _ in range(3))
        with compute.activate():
            slots = tuple(Slot(device, True) for _ in range(DEPTH))
        return Lane(device, slots, upload, compute, download, block_bytes)


def pinned_bytes(nbytes: int) -> Tensor:
    """(nbytes,) uint8 of host memory that devices read and write by themselves, at a page's start."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def forget_workspaces() -> None:
    """Give back what cuBLAS holds for threads and streams that have multiplied: every merge has new ones of both."""
    torch._C._cuda_clearCublasWorkspaces()


def product_workspace(device: torch.device) -> int:
    """Bytes that cuBLAS takes of the device for each thread that multiplies: 8 MB, on Hopper 32."""
    forget_workspaces()
    with current_device(device), CudaQueue(device).activate():
        one = torch.ones(16, 16, device=device)
        product = torch.empty_like(one)
        before = torch.cuda.memory_allocated(device)
        torch.mm(one, one, out=product)
        found = torch.cuda.memory_allocated(device) - before
    forget_workspaces()
    return found


def _need(shards: Sequence[ShardPlan]) -> tuple[int, int, int]:
    """What one worker takes of a device: bytes of forms, blocks, and the bytes of the smallest block, one row."""
    jobs = [job for shard in shards for job in shard.jobs if job.edits]
    forms = max(map(form_bytes, jobs), default=0)
    row = max((job.source.shape[-1] * arithmetic_of(job).itemsize for job in jobs), default=0)
    shares = max((len(getattr(edit.module, "shares", ())) for job in jobs for edit in job.edits), default=0)
    blocks = DEPTH * BLOCKS_PER_SLOT + TEMPORARY_BLOCKS + shares * BLOCKS_PER_SHARE
    return FORMS_HELD * forms, blocks, max(LEAST_BYTES, row)


def cuda_lanes(
    devices: Sequence[torch.device],
    shards: Sequence[ShardPlan],
    workers: int | None,  # on each device
    vram: int | None,  # bytes of each device; None: a quarter of what is free
    hashing: bool,
) -> tuple[list[LaneMaker], int]:
    """The lanes of all workers, and the size of their blocks. Raises InputError where a device's memory is too small.

    Memory that does not suffice for all workers has fewer of them. A pass over a whole weight counts as one more.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // len(devices))
    most = workers or min(cores, HASHING_WORKERS if hashing else WORKERS)
    forms, blocks, least = _need(shards)
    sizes: list[tuple[torch.device, int]] = []
    for device in devices:
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of what is this process's
        free = torch.cuda.mem_get_info(device)[0] + kept
        held = forms + product_workspace(device)
        one = held + blocks * least
        need = 2 * one
        given = min(vram or int(free * VRAM_FRACTION), free)
        if vram is None and given < need <= free:
            given = need
        if given < need:
            raise InputError(
                f"{device}: {given / 1e6:.0f} MB of its memory are too little" + (" (--vram)" if vram else ""),
                expected=f"{need / 1e6:.0f} MB for the adapter's largest factors and a few rows of a weight",
                hint="give more with --vram, or take --device cpu",
            )
        each = min(most, given // one - 1)
        sizes += [(device, min(BLOCK_BYTES, (given // (each + 1) - held) // blocks))] * each
    block = min(size for _, size in sizes)  # a block may go to any device
    return [partial(cuda_lane, device, block) for device, _ in sizes], block
