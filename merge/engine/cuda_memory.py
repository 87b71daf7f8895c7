"""Division of a CUDA device's memory: the number of workers, and the size of their blocks, within --vram.

A device computes a block about a hundred times faster than a host thread reads, hashes and writes it, so the time of a
merge is the time of the host's work. Each device therefore has several workers. Their blocks are small: blocks of 8 MB
are transferred over PCIe at the same rate as blocks of 32 MB.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from adapter_merge.errors import InputError

from .lanes import current_device
from .plan import ShardPlan
from .tasks import arithmetic_of, estimate_edit_bytes

BLOCK_BYTES = 8 << 20  # of float32 in one block, at most
LEAST_BYTES = 1 << 16  # of float32 in one block, at least
DEPTH = 3  # slots of a lane: one is uploaded, one computed and one downloaded at the same time
WORKERS = 2  # per device: one reads while the other's blocks are written; six took more than twice as long
HASHING_WORKERS = 4  # per device: each hashes the file that it reads, in parallel with the others
VRAM_FRACTION = 0.25  # of the free device memory, where --vram is not given
BLOCKS_PER_SLOT = 4  # input, work, spare, output
TEMPORARY_BLOCKS = 8  # temporary tensors of an edit
BLOCKS_PER_SHARE = 12  # temporary tensors per adapter of a combination: delta, int64 sizes, its part of the stack
EDITS_HELD = 2  # per worker: the edits in use, and the previous ones, which the allocator has not freed yet


def free_cublas_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps per thread and stream; every merge uses new threads and new streams."""
    torch._C._cuda_clearCublasWorkspaces()


def measure_cublas_workspace(device: torch.device) -> int:
    """Return the bytes of device memory that cuBLAS takes per thread: 8 MB, on Hopper 32 MB."""
    free_cublas_workspaces()
    with current_device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        factor = torch.ones(16, 16, device=device)
        product = torch.empty_like(factor)
        before = torch.cuda.memory_allocated(device)
        torch.mm(factor, factor, out=product)
        nbytes = torch.cuda.memory_allocated(device) - before
    free_cublas_workspaces()
    return nbytes


def estimate_worker_memory(shards: Sequence[ShardPlan]) -> tuple[int, int, int]:
    """Return what one worker needs on a device: bytes of its edits, number of blocks, bytes of the smallest block."""
    jobs = [job for shard in shards for job in shard.jobs if job.edits]
    edits = max(map(estimate_edit_bytes, jobs), default=0)
    row = max((job.source.shape[-1] * arithmetic_of(job).itemsize for job in jobs), default=0)
    shares = max((edit.module.share_count for job in jobs for edit in job.edits), default=0)
    blocks = DEPTH * BLOCKS_PER_SLOT + TEMPORARY_BLOCKS + shares * BLOCKS_PER_SHARE
    return EDITS_HELD * edits, blocks, max(LEAST_BYTES, row)


def share_memory(
    devices: Sequence[torch.device],
    shards: Sequence[ShardPlan],
    workers: int | None,  # on each device
    vram: int | None,  # bytes of each device; None: a quarter of what is free
    hashing: bool,
) -> list[tuple[torch.device, int]]:
    """Return each worker's device, and the size of its blocks in bytes of float32.

    Where a device's memory does not suffice for all workers, it gets fewer. A pass over a whole weight needs as much
    memory as a worker. Raises InputError where a device has too little memory for one worker and one pass.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // len(devices))
    most = workers or min(cores, HASHING_WORKERS if hashing else WORKERS)
    edits, blocks, least = estimate_worker_memory(shards)
    sizes: list[tuple[torch.device, int]] = []
    for device in devices:
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by this process's allocator
        free = torch.cuda.mem_get_info(device)[0] + cached
        fixed = edits + measure_cublas_workspace(device)
        per_worker = fixed + blocks * least
        need = 2 * per_worker
        allowed = min(vram or int(free * VRAM_FRACTION), free)
        if vram is None and allowed < need <= free:
            allowed = need
        if allowed < need:
            raise InputError(
                f"{device}: {allowed / 1e6:.0f} MB of device memory are too little" + (" (--vram)" if vram else ""),
                expected=f"{need / 1e6:.0f} MB for the adapter's largest factors and a few rows of a weight",
                hint="allow more with --vram, or use --device cpu",
            )
        count = min(most, allowed // per_worker - 1)
        sizes += [(device, min(BLOCK_BYTES, (allowed // (count + 1) - fixed) // blocks))] * count
    return sizes
