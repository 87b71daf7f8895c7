"""Lanes of CUDA devices: three streams (upload, compute, download) and the slots that they work on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cuda_memory import DEPTH, share_memory
from .lanes import Lane, LaneMaker, Mark, Slot, current_device
from .plan import ShardPlan


class CudaQueue:
    """CUDA stream as a `Queue` (lanes.py)."""

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
    """Make one worker's lane on a CUDA device, with blocks of `block_bytes` (of float32)."""
    with current_device(device):
        upload, compute, download = (CudaQueue(device) for _ in range(3))
        with compute.activate():
            slots = tuple(Slot(device, True) for _ in range(DEPTH))
        return Lane(device, slots, upload, compute, download, block_bytes)


def pinned_bytes(nbytes: int) -> Tensor:
    """Allocate (nbytes,) uint8 of pinned host memory, which devices read and write directly."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def cuda_lanes(
    devices: Sequence[torch.device],
    shards: Sequence[ShardPlan],
    workers: int | None,  # on each device
    vram: int | None,  # bytes of each device; None: a quarter of what is free
    hashing: bool,
) -> tuple[list[LaneMaker], int]:
    """Return a maker of a lane for every worker, and the size of their blocks in bytes of float32.

    Raises InputError where a device has too little memory (cuda_memory.py).
    """
    sizes = share_memory(devices, shards, workers, vram, hashing)
    block = min(size for _, size in sizes)  # any worker may take any block
    return [partial(cuda_lane, device, block) for device, _ in sizes], block
