"""Run as a program by test_safety.py: starts real merges and kills, starves or races them. Prints counts as JSON.

Children are forked, so that fifty kills do not pay for fifty imports of torch; each is a process of its own, killed
by the kernel at a moment of its own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapter_merge.api import merge as merging
from adapter_merge.api.options import MergeOptions
from adapter_merge.errors import OutputError
from adapter_merge.outputs.integrity import check_integrity

torch.set_num_threads(1)


def fork(action: Callable[[], Any]) -> int:
    """Start `action` in a child; its exit code is 0, or 1 for an OutputError, or 3 for anything else."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        action()
        code = 0
    except OutputError as error:
        print(error, file=sys.stderr)
        code = 1
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_child(code: int) -> None:
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a merge ended with {code}")


def same_weights(one: Path, other: Path) -> bool:
    names = {path.name for path in one.glob("*.safetensors")}
    return names == {path.name for path in other.glob("*.safetensors")} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def kill(base: Path, adapter: Path, output: Path, whole: Path, kills: int) -> dict[str, int]:
    """Kill merges until `kills` were hit; after each, the output is not there or it is whole."""

    def run() -> None:
        merging.merge(base, adapter, output)

    chance = random.Random(0)
    started = time.monotonic()
    check_child(wait(fork(run)))
    lasted = time.monotonic() - started
    shutil.rmtree(output)
    counted = {"killed": 0, "finished": 0, "resumed": 0}
    while counted["killed"] < kills:
        pid = fork(run)
        time.sleep(chance.random() * lasted * 0.8)
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        check_child(code)
        counted["killed"] += code != 0
        staging = output.parent / f".{output.name}.partial"
        counted["resumed"] += len(list(staging.glob("journal/model*.json"))) > 0
        if output.exists():
            check_integrity(output)
            if not same_weights(output, whole):
                raise SystemExit("a finished output has other weights")
            shutil.rmtree(output)
            counted["finished"] += 1
    check_child(wait(fork(run)))
    return counted


def replace(base: Path, adapter: Path, output: Path, old: Path, new: Path, kills: int) -> dict[str, int]:
    """Kill merges that replace an output: the old one, or the new one, is always there and whole."""

    def run() -> None:
        merging.merge(base, adapter, output, MergeOptions(overwrite=True))

    chance = random.Random(1)
    counted = {"killed": 0, "replaced": 0}
    lasted = 0.5
    while counted["killed"] < kills:
        started = time.monotonic()
        pid = fork(run)
        time.sleep(chance.random() * lasted)
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        check_child(code)
        if code == 0:
            lasted = max(0.05, min(lasted, time.monotonic() - started))
        counted["killed"] += code != 0
        check_integrity(output)
        if same_weights(output, new):
            counted["replaced"] += 1
            shutil.rmtree(output)
            shutil.copytree(old, output)
        elif not same_weights(output, old):
            raise SystemExit("the output is neither the old nor the new one")
    return counted


def limit(base: Path, adapter: Path, output: Path, nbytes: int) -> dict[str, int]:
    """A merge whose files may not be larger than `nbytes` (RLIMIT_FSIZE)."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        merging.merge(base, adapter, output)

    return {"code": wait(fork(run))}


def full(base: Path, adapter: Path, output: Path) -> dict[str, int]:
    """A merge onto a disk that fills up after it was found large enough."""

    def run() -> None:
        merging.check_space = lambda *_: None  # type: ignore[assignment]
        merging.merge(base, adapter, output)

    return {"code": wait(fork(run))}


def race(base: Path, adapter: Path, output: Path, count: int) -> dict[str, int]:
    """Several merges to one output at once."""
    codes = [wait(pid) for pid in [fork(lambda: merging.merge(base, adapter, output)) for _ in range(count)]]
    return {"done": codes.count(0), "refused": codes.count(1)}


def parts(base: Path, adapter: Path, output: Path, count: int) -> dict[str, int]:
    """All parts of a split merge at once."""
    pids = [
        fork(lambda number=number: merging.merge(base, adapter, output, MergeOptions(part=(number, count))))  # type: ignore[misc]
        for number in range(1, count + 1)
    ]
    return {"done": [wait(pid) for pid in pids].count(0)}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    values = [int(value) if value.isdigit() else Path(value) for value in arguments]
    action: Callable[..., dict[str, int]] = globals()[name]
    print(json.dumps(action(*values)))
