"""Execution of a plan: workers read, compute and write blocks of rows.

    read a block -> (hash) -> float32 -> apply the edits -> round once -> a chunk of the output -> (hash) -> disk

    schedule.py      hands out tasks to workers           tasks.py       the tasks of one file, in order
    worker.py        loop of one worker                   lanes.py       buffers and queues that compute a block
    cuda_lanes.py    CUDA streams and device memory       chunked_file.py    one output file
    worker_count.py  the default number of workers

Base weights are never in memory as a whole; the edits of the tensors being merged are. Each worker runs torch with one
thread, because torch's own threads make blocks of this size slower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from adapter_merge.errors import InputError
from adapter_merge.files.hashing import Stopped
from adapter_merge.files.links import LINKS
from adapter_merge.storage.input_files import Sources

from .chunked_file import ChunkPool, aligned_bytes
from .cuda_lanes import cuda_lanes, pinned_bytes
from .cuda_memory import free_cublas_workspaces
from .devices import exact_products, one_thread
from .lanes import LaneMaker, cpu_lane
from .plan import MergePlan, ShardPlan
from .run_settings import Progress, Recorder, RunSettings
from .schedule import FinishedShard, Schedule
from .worker import Worker
from .worker_count import count_cpu_workers

__all__ = ["FinishedShard", "Progress", "Recorder", "execute"]

WRITERS = 4  # threads that hash and write chunks

OnShard = Callable[[FinishedShard], None]


class _Run:
    """One execution: its threads, and the first failure, which stops all of them."""

    def __init__(
        self, shards: Sequence[ShardPlan], lanes: Sequence[LaneMaker], settings: RunSettings, on_shard: OnShard
    ) -> None:
        self.lanes, self.settings, self.on_shard = lanes, settings, on_shard
        self.shards_left = len(shards)
        self.failure: BaseException | None = None
        self.changed = threading.Condition(threading.Lock())
        self.writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self.sources = Sources()
        self.pool = ChunkPool(make=pinned_bytes if settings.device.type == "cuda" else aligned_bytes)
        self.schedule = Schedule(shards, settings, self.sources, self.pool, self._submit, self._finish_shard)

    def run(self) -> None:
        """Run to the end. Raises the first failure, with every thread ended and every file closed."""
        threads = [
            threading.Thread(target=self._guard, args=(lambda make=make: self._work(make),), name=f"merge-{number}")
            for number, make in enumerate(self.lanes)
        ]
        try:
            for thread in threads:
                thread.start()
            with self.changed:
                self.changed.wait_for(lambda: self.failure is not None or self.shards_left == 0)
        finally:  # also after KeyboardInterrupt
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self.writers.shutdown(cancel_futures=True)
            self.schedule.close()
            self.sources.close()
        if isinstance(self.failure, torch.OutOfMemoryError):
            raise InputError(
                f"the device ran out of memory ({str(self.failure).splitlines()[0]})",
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
        """Run `action`; keep the first failure of all threads and stop the run."""
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
        """Run `action` on a writer thread. Raises Stopped where the run has been stopped."""
        try:
            self.writers.submit(self._guard, action)
        except RuntimeError:  # the pool was shut down after a failure in another thread
            raise Stopped from None

    def _finish_shard(self, shard: FinishedShard) -> None:
        """Report a shard that is on the disk, and end the run after the last one."""
        self.on_shard(shard)
        with self.changed:
            self.shards_left -= 1
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
    on_shard: OnShard | None = None,
    recorder: Recorder | None = None,
) -> dict[str, FinishedShard]:
    """Write `shards` (by default all of the plan's) into `folder`; return them by file name, once they are on the disk.

    device: one device, or several CUDA devices that share the shards.
    workers: threads per device; None uses the number that was measured to be fastest (worker_count.py).
    progress: called with the number of bytes just written, from any thread.
    hashing: compute the sha256 of every file read from end to end, and of every file written.
    direct: write past the page cache (O_DIRECT) where the file system allows it.
    link: how shards that no adapter changes are made: copied or linked (see links.py).
    vram: bytes of device memory to use per CUDA device; None uses a quarter of what is free.
    on_shard: called when a shard is on the disk, from a writer thread.
    recorder: records every change of the base's bytes.
    Raises NumericsError for NaN or infinity in a result, FileFormatError for an input shard that ends too early,
    InputError where a device has too little memory, OSError where a file cannot be written. The first failure stops
    all workers.
    """
    assert link in LINKS
    devices = [device] if isinstance(device, torch.device) else list(device)
    on_cuda = devices[0].type == "cuda"
    if on_cuda:
        lanes, block_bytes = cuda_lanes(devices, plan.shards if shards is None else shards, workers, vram, hashing)
    else:
        count = workers or count_cpu_workers()
        lanes, block_bytes = [cpu_lane] * count, cpu_lane().block_bytes
    finished: dict[str, FinishedShard] = {}

    def add_finished(shard: FinishedShard) -> None:
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
    run = _Run(plan.shards if shards is None else shards, lanes, settings, add_finished)
    try:
        with one_thread(), exact_products(devices[0]):
            run.run()
    finally:
        if on_cuda:
            free_cublas_workspaces()
    return finished
