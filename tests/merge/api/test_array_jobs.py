"""The example files for Slurm and Kubernetes: their own commands, run with the variables that each scheduler sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from merge_models import shard_hashes, write_four_shards

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.outputs.integrity import check_integrity

EXAMPLES = Path(__file__).parents[3] / "examples"
PARTS = 8
pytestmark = [pytest.mark.slow(first=False), pytest.mark.preloaded("torch")]


def environment(folder: Path) -> dict[str, str]:
    """An environment in which adapter-merge is the command under test."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "adapter-merge"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m adapter_merge "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}


def run(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_parts_then_finish(part: Callable[[int], None], finish: Callable[[], None]) -> None:
    """The parts two at a time; the first of them runs twice, as a scheduler does with a task whose node was lost."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(part, [*range(PARTS), 0]))
    finish()


def check(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "whole", MergeOptions(device="cpu"))
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")
    check_integrity(tmp_path / "out", inputs=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_slurm_array(tmp_path: Path) -> None:
    """sbatch runs the script with its arguments and SLURM_ARRAY_TASK_ID; the numbers are those of --array."""
    pair = write_four_shards(tmp_path)
    variables, script = environment(tmp_path), EXAMPLES / "slurm_array.sh"
    assert re.search(rf"^#SBATCH --array=1-{PARTS}$", script.read_text(), re.MULTILINE)
    command = ["bash", str(script), *map(str, pair), str(tmp_path / "out")]
    run_parts_then_finish(
        lambda index: run(command, variables | {"SLURM_ARRAY_TASK_ID": str(index + 1)}),
        lambda: run([*command, "--finish"], variables | {"SLURM_ARRAY_TASK_ID": "0"}),
    )
    check(tmp_path, pair)


def test_the_kubernetes_jobs(tmp_path: Path) -> None:
    """A pod of an Indexed Job has JOB_COMPLETION_INDEX from 0 to completions - 1."""
    pair = write_four_shards(tmp_path)
    base = environment(tmp_path)
    own = dict(zip(("BASE", "ADAPTER", "OUT"), map(str, (*pair, tmp_path / "out")), strict=True))
    jobs = [yaml.safe_load((EXAMPLES / f"kubernetes_{name}.yaml").read_text())["spec"] for name in ("parts", "finish")]
    assert (jobs[0]["completionMode"], jobs[0]["completions"]) == ("Indexed", PARTS)
    containers = [job["template"]["spec"]["containers"][0] for job in jobs]
    assert all(own.keys() <= {entry["name"] for entry in container["env"]} for container in containers)
    run_parts_then_finish(
        lambda index: run(containers[0]["command"], base | own | {"JOB_COMPLETION_INDEX": str(index)}),
        lambda: run(containers[1]["command"], base | own),
    )
    check(tmp_path, pair)
