"""The default number of a merge's workers on the CPU. On CUDA it follows from the device's memory (cuda_memory.py)."""

from __future__ import annotations

import os

CPU_WORKERS = 4  # at most: on 16 cores, 16 workers took nearly twice as long as four


def count_cpu_workers() -> int:
    """Return the number of workers for the processors that this process may use."""
    return min(CPU_WORKERS, len(os.sched_getaffinity(0)))
