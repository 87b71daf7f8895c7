"""Limits of a server's child processes: the parent's lifetime, memory and priority."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NICE = 10
CORES = 4  # cores of one conversion, which needs the memory of one weight per core


def die_with_parent(parent: int, number: int) -> None:
    """Ask the kernel to send signal `number` to this process when its parent (process id `parent`) ends."""
    library = ctypes.CDLL(None)
    if os.getppid() == parent and hasattr(library, "prctl"):
        library.prctl(PR_SET_PDEATHSIG, number)


def limit_memory(nbytes: int) -> None:
    """Limit this process to `nbytes` more memory than it has now; further allocations raise MemoryError.

    The limit counts private writable memory (RLIMIT_DATA), not files that are mapped for reading.
    """
    match = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    present = int(match[1]) * 1024 if match is not None else 0
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = present + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def lower_priority() -> None:
    """Lower this process's priority, restrict it to few cores, and let the kernel kill it first without memory."""
    os.nice(NICE)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-CORES:])
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "utf-8")
