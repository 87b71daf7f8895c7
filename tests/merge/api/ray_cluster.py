"""A Ray cluster of this machine in a process of its own, for tests: python ray_cluster.py CPUS

It prints its address and ends when its stdin is closed.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
TITLE = b"ray::write_file"  # what Ray calls the process of a worker that runs this task


@contextmanager
def ray_cluster(cpus: int) -> Iterator[tuple[str, int]]:
    """Yield the address of a new cluster of one machine with `cpus` CPUs, and the process id above its workers."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("address ")), "")
        assert line, "the cluster did not start"
        yield line.split()[1], process.pid
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def running_tasks(ancestor: int) -> list[int]:
    """The processes below `ancestor` that run the task now."""
    parents: dict[int, int] = {}
    titles: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()

    def is_below(pid: int) -> bool:
        while pid in parents:
            if parents[pid] == ancestor:
                return True
            pid = parents[pid]
        return False

    return sorted(pid for pid, title in titles.items() if title.startswith(TITLE) and is_below(pid))


def has_open(pid: int, part: str) -> bool:
    """True where the process has a file open whose path contains `part`."""
    with suppress(OSError):
        return any(part in str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def kill(pid: int) -> bool:
    """SIGKILL the process; False where it has gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        context = ray.init(
            num_cpus=int(sys.argv[1]),
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _temp_dir=folder,
        )
        print("address", context.address_info["address"], flush=True)
        sys.stdin.read()
        ray.shutdown()


if __name__ == "__main__":
    main()
