"""Devices without CUDA: slots that copy as for a device, and the engine's view of devices that are not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from adapter_merge.engine import cuda_lanes, cuda_memory
from adapter_merge.engine import execute as engine
from adapter_merge.engine.chunked_file import aligned_bytes
from adapter_merge.engine.lanes import Inline, Lane, Slot

CPU = torch.device("cpu")
WORKSPACE = 1 << 20


def device_slot() -> Slot:
    """A slot whose device happens to be the CPU, but which does not know it: uploads and downloads are real copies."""
    slot = Slot(CPU, pinned=False)
    slot.on_host = False
    slot.sums, slot.norm = torch.empty_like(slot.sums), torch.empty_like(slot.norm)
    return slot


def lagging_lane(block_bytes: int) -> Lane:
    """A lane of such slots, several blocks in flight."""
    slots = tuple(device_slot() for _ in range(cuda_memory.DEPTH))
    return Lane(CPU, slots, Inline(), Inline(), Inline(), block_bytes)


@contextlib.contextmanager
def stand_in_devices(
    patch: pytest.MonkeyPatch,
    make: Callable[[torch.device, int], Lane],  # device and bytes of a block -> lane
    free: tuple[int, ...],  # bytes, of each device
) -> Iterator[list[tuple[int, int]]]:
    """CUDA devices as the engine sees them. Yields the device and the block's bytes of every lane that it makes."""
    given: list[tuple[int, int]] = []

    def lane_of(device: torch.device, block_bytes: int) -> Lane:
        given.append((device.index, block_bytes))
        return make(device, block_bytes)

    for module in ("worker", "schedule"):
        patch.setattr(f"adapter_merge.engine.{module}.current_device", lambda device: contextlib.nullcontext())
    patch.setattr(cuda_lanes, "cuda_lane", lane_of)
    patch.setattr(cuda_memory, "measure_cublas_workspace", lambda device: WORKSPACE)
    patch.setattr(engine, "free_cublas_workspaces", lambda: None)
    patch.setattr(engine, "pinned_bytes", aligned_bytes)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 80 << 30))
    patch.setattr(cuda_memory.os, "sched_getaffinity", lambda pid: range(8))
    yield given
