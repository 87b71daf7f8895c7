"""Devices without CUDA: slots that copy as for a device, and the engine's view of devices that are not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_merge.engine import cuda_lanes, cuda_memory
from adapter_merge.engine import execute as engine
from adapter_merge.engine.chunked_file import aligned_bytes
from adapter_merge.engine.lanes import Block, Inline, Lane, Slot
from adapter_merge.methods.block_edits import BlockEdit

Launch = Callable[[Slot, Block, Sequence[BlockEdit], Sequence[Tensor]], None]
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


@dataclass(frozen=True, kw_only=True)
class WatchedLane(Lane):
    """A lane that hands every launch to `watch`, which gets the lane and the launch of a plain lane."""

    watch: Callable[..., None]

    def launch(self, slot: Slot, block: Block, edits: Sequence[BlockEdit], targets: Sequence[Tensor]) -> None:
        self.watch(self, super().launch, slot, block, edits, targets)


def watched(lane: Lane, watch: Callable[..., None]) -> Lane:
    """The lane with `watch` in the place of its launch."""
    parts: dict[str, Any] = {part.name: getattr(lane, part.name) for part in fields(Lane)}
    return WatchedLane(**parts, watch=watch)
