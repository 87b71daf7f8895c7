"""Execution of a plan: blocks of rows, handed out in the files' order, computed by workers, written past the cache.

    read a block -> (hash) -> float32 -> the canonical form -> round once -> a chunk of the output -> (hash) -> disk

    schedule.py  who works on what      tasks.py  the steps of one file     worker.py  one worker's round
    lanes.py     where blocks are computed, CPU and CUDA alike              cuda_lanes.py  streams, device memory
    chunked_file.py    one output file

Nothing is ever held whole but the adapter of the tensors in work. Each worker runs torch with one thread, since
torch's own threads cost more on blocks this small than they give.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from adapter_merge.errors import InputError
from adapter_merge.storage.hashing import Stopped
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.links import LINKS

from .chunked_file import ChunkPool, aligned_bytes
from .cuda_lanes import cuda_lanes, forget_workspaces, pinned_bytes
from .devices import exact_products, one_thread
from .lanes import LaneMaker, cpu_lane
from .plan import MergePlan, ShardPlan
from .run_settings import Progress, Recorder, RunSettings
from .schedule import FinishedShard, Schedule
from .worker import Worker

__all__ = ["FinishedShard", "Progress", "Recorder", "execute"]

WRITERS = 4
CPU_WORKERS = 4  # at most, whatever the cores: on 16 of them 16 workers took nearly twice as long as four

Shards = Callable[[FinishedShard], None]


class _Run:
    """One execution: its threads, and the first failure that ends them all."""

    def __init__(
        self, shards: Sequence[ShardPlan], lanes: Sequence[LaneMaker], settings: RunSettings, on_shard: Shards
    ) -> None:
        self.lanes, self.settings, self.on_shard = lanes, settings, on_shard
        self.left = len(shards)
        self.failure: BaseException | None = None
        self.changed = threading.Condition(threading.Lock())
        self.writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self.sources = Sources()
        self.pool = ChunkPool(make=pinned_bytes if settings.device.type == "cuda" else aligned_bytes)
        self.schedule = Schedule(shards, settings, self.sources, self.pool, self._submit, self._finished)

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guard, args=(lambda make=make: self._work(make),), name=f"merge-{number}")
            for number, make in enumerate(self.lanes)
        ]
        try:
            for thread in threads:
                thread.start()
            with self.changed:
                self.changed.wait_for(lambda: self.failure is not None or self.left == 0)
        finally:  # an interrupt as well
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self.writers.shutdown(cancel_futures=True)
            self.schedule.close()
            self.sources.close()
        if isinstance(self.failure, torch.OutOfMemoryError):
            raise InputError(
                f"the device's memory does not suffice ({str(self.failure).splitlines()[0]})",
                hint="pass a smaller --vram, free the device, or use --device cpu",
            ) from self.failure
        if self.failure is not None:
            raise self.failure

    def _work(self, make: LaneMaker) -> None:
        Worker(make(), self.schedule, self.sources, self.pool, self.settings).work()

    def _stop(self) -> None:
        self.schedule.stop()
        self.pool.stop()

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Stopped:
            pass
        except BaseException as error:
            with self.changed:
                if self.failure is None and not self.schedule.stopping:
                    self.failure = error
                self.changed.notify_all()
            self._stop()

    def _submit(self, action: Callable[[], None]) -> None:
        try:
            self.writers.submit(self._guard, action)
        except RuntimeError:  # shut down by a failure elsewhere
            raise Stopped from None

    def _finished(self, shard: FinishedShard) -> None:
        self.on_shard(shard)
        with self.changed:
            self.left -= 1
            self.changed.notify_all()


def execute(
    plan: MergePlan,
    folder: Path,
    device: torch.device | Sequence[torch.device],
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    shards: Sequence[ShardPlan] | None = None,
    hashing: bool = True,
    direct: bool = True,
    link: str = "copy",
    vram: int | None = None,
    on_shard: Shards | None = None,
    recorder: Recorder | None = None,
) -> dict[str, FinishedShard]:
    """Write `shards` (all of the plan's where none are named) into `folder`, on the disk when this returns.

    device: one, or several CUDA devices that share the shards.
    workers: threads, on each device; None takes what has been measured to be fastest (CPU_WORKERS, cuda_lanes.py).
    progress: called with the bytes just written, from any thread.
    direct: write past the page cache where the file system can.
    link: how shards that no adapter touches get there (see links.py).
    vram: bytes of device memory to use per CUDA device; None takes a quarter of what is free.
    on_shard: called, one thread at a time per shard, when a shard is on the disk.
    Raises NumericsError for NaN or infinity in a result, FileFormatError for a shard that ends too early, OSError
    for what the disk refuses. The first failure stops the rest.
    """
    assert link in LINKS
    devices = [device] if isinstance(device, torch.device) else list(device)
    on_cuda = devices[0].type == "cuda"
    if on_cuda:
        lanes, block_bytes = cuda_lanes(devices, plan.shards if shards is None else shards, workers, vram, hashing)
    else:
        count = workers or min(CPU_WORKERS, len(os.sched_getaffinity(0)))
        lanes, block_bytes = [cpu_lane] * count, cpu_lane().block_bytes
    finished: dict[str, FinishedShard] = {}

    def remember(shard: FinishedShard) -> None:
        finished[shard.file] = shard
        if on_shard is not None:
            on_shard(shard)

    settings = RunSettings(
        folder=folder,
        device=devices[0],
        workers=len(lanes),
        block_bytes=block_bytes,
        hashing=hashing,
        direct=direct,
        link=link,
        is_delta=plan.operation == "delta",
        progress=progress,
        recorder=recorder,
    )
    run = _Run(plan.shards if shards is None else shards, lanes, settings, remember)
    try:
        with one_thread(), exact_products(devices[0]):
            run.run()
    finally:
        if on_cuda:
            forget_workspaces()
    return finished
