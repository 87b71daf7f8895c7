"""A few of the crash points of the commands that write; all of them: `python tests/merge/crash/crash_points.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "crash" / "crash_points.py"


def campaign(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.mark.slow(first=False)
@pytest.mark.parametrize("scenario", ["merge overwrite", "convert"])
def test_killed_and_without_what_was_not_synced(scenario: str) -> None:
    counted = campaign(scenario, "--actions", "kill", "tear", "lost", "--every", "6")[scenario]
    assert counted["kill"] > 2 and counted["new output"] > 0 and counted["calls"]["fsync"] > 3


@pytest.mark.slow
def test_calls_that_fail(tmp_path: Path) -> None:
    counted = campaign("factor", "--actions", "fail", "unreadable", "--every", "8")["factor"]
    assert counted["reported"] > 10
