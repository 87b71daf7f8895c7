"""What processes of a server are bound by: the life of the process that started them, memory, and their priority."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NICE = 10
CORES = 4  # of one conversion: it works on one weight per core, and each takes memory


def end_with(parent: int, number: int) -> None:
    """Have the kernel send signal `number` to this process when `parent`, which started it, dies in whatever way."""
    library = ctypes.CDLL(None)
    if os.getppid() == parent and hasattr(library, "prctl"):
        library.prctl(PR_SET_PDEATHSIG, number)


def bound_memory(nbytes: int) -> None:
    """Let this process allocate at most `nbytes` more than it has now: what is above fails as MemoryError does.

    The limit is that of private writable memory (RLIMIT_DATA): files that are only read do not count.
    """
    found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    present = int(found[1]) * 1024 if found is not None else 0
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = present + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def give_way() -> None:
    """Run behind the server, on few cores, and be the first that a system without memory ends."""
    os.nice(NICE)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-CORES:])
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "utf-8")
