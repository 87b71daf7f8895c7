"""A merge of 70B shapes on a Ray cluster: its plan from sparse files, its time from rates that are measured here.

    python benchmarks/cluster_plan.py SCRATCH [--size 70b] [--machines 1 2 4 8 16 30]

Measured: the driver's time until the first task (open, check, plan); of a task, the time to open the same inputs, once
per worker, and the rate at which it writes a file of random numbers (the 1.1B shapes), with hashes, alone on this
machine; the rate of one sha256. Calculated: the time by number of machines, of which each runs one task at a time, with
the largest files first, as the driver submits them. Assumed: the shared file system gives every machine the rate that
this disk gives here. The last line runs two tasks at once here, to show what a machine's cores and disk share.
"""

from __future__ import annotations

import argparse
import heapq
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from synthetic import write_adapter, write_checkpoint

from adapter_merge.api.options import MergeOptions
from adapter_merge.api.plans import make_plan
from adapter_merge.api.ray_tasks import make_job, write_file
from adapter_merge.combine.open_inputs import check_values, describe_inputs, open_pair
from adapter_merge.outputs.leftovers import remove

TASK = """
import sys, time
started = time.perf_counter()
sys.path.insert(0, {here!r})
from pathlib import Path
from cluster_plan import run_tasks
run_tasks(Path({scratch!r}), started, {part})
"""


def run_tasks(scratch: Path, started: float, part: int) -> None:
    """Write the files of the 1.1B shapes as a worker does; print the seconds of its start and of each file."""
    base, adapter, folder = scratch / "base-1.1b", scratch / "lora-1.1b", scratch / f"tasks-{part}"
    options = MergeOptions()
    bound = open_pair(base, adapter)
    job = make_job(bound, base, adapter, options, folder)
    (job.folder / job.tasks).mkdir(parents=True)
    print(f"start {time.perf_counter() - started:.2f}")
    for shard in make_plan(bound, options).shards:
        began = time.perf_counter()
        result = write_file(job, shard.file, shard.identity)
        assert "finished" in result, result
        print(f"file {shard.nbytes} {time.perf_counter() - began:.3f}")
    remove(folder)


def measured(scratch: Path, tasks: int) -> tuple[float, float]:
    """(seconds until a worker's first file, bytes per second of one task) with so many tasks at once."""
    here = str(Path(__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TASK.format(here=here, scratch=str(scratch), part=part)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(tasks)
    ]
    lines = [line.split() for process in processes for line in process.communicate()[0].splitlines()]
    starts = [float(line[1]) for line in lines if line[0] == "start"]
    later = [line for line in lines if line[0] == "file"]
    return max(starts), sum(int(line[1]) for line in later) / sum(float(line[2]) for line in later)


def makespan(sizes: Sequence[int], machines: int, rate: float, start: float) -> float:
    """Seconds until the last file is written: each machine takes the largest file that is left."""
    ends = [start] * machines
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(ends, ends[0] + size / rate)
    return max(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--size", default="70b")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 2, 4, 8, 16, 30])
    given = parser.parse_args()
    base, adapter = given.scratch / f"base-{given.size}-sparse", given.scratch / f"lora-{given.size}"
    write_checkpoint(base, given.size, sparse=True)
    write_adapter(adapter, given.size, "lora")
    write_checkpoint(given.scratch / "base-1.1b", "1.1b")
    write_adapter(given.scratch / "lora-1.1b", "1.1b", "lora")

    began = time.perf_counter()
    bound = open_pair(base, adapter)
    check_values(bound)
    plan = make_plan(bound, MergeOptions())
    describe_inputs(bound)
    driver = time.perf_counter() - began
    sizes = [shard.nbytes for shard in plan.shards]
    disk = sum(file.stat().st_blocks * 512 for file in base.iterdir())
    print(f"plan: {len(sizes)} files, {sum(sizes) / 1e9:.1f} GB, largest {max(sizes) / 1e9:.2f} GB, from {disk} bytes")
    began = time.perf_counter()
    make_job(open_pair(base, adapter), base, adapter, MergeOptions(), given.scratch)
    worker = time.perf_counter() - began
    start, rate = measured(given.scratch, 1)
    print(f"driver until the first task {driver:.1f} s, a worker until its first file {start + worker:.1f} s")
    print(f"one task {rate / 1e9:.2f} GB/s")
    print("| machines | seconds | GB/s of the file system, read and written |\n|---|---|---|")
    for machines in given.machines:
        seconds = driver + makespan(sizes, machines, rate, start + worker)
        print(f"| {machines} | {seconds:.0f} | {2 * rate * min(machines, len(sizes)) / 1e9:.1f} |")
    _, both = measured(given.scratch, 2)
    print(f"two tasks at once on this machine: {both / 1e9:.2f} GB/s each")


if __name__ == "__main__":
    main()
