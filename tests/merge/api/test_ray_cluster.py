"""`--ray`: tasks on a local Ray cluster whose workers are killed at random write what one process writes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from merge_models import base_tensors, shard_hashes, snapshot, write_base, write_lora
from ray_cluster import ENVIRONMENT, has_open, kill, ray_cluster, running_tasks

from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, MergeOptions
from adapter_merge.api.ray_tasks import TASK_CPUS
from adapter_merge.outputs.integrity import check_integrity

pytestmark = pytest.mark.cluster

WORKERS = 4
SHARDS = 8
KILLS = 4


@pytest.fixture(scope="module", autouse=True)
def _needs_ray() -> None:
    pytest.importorskip("ray")  # not at the module's import, where it would count as a skip of a run without `cluster`


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    with ray_cluster(WORKERS * TASK_CPUS) as running:
        yield running


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 140 MB in 8 files, and a DoRA: a file takes long enough to be killed in the middle of it."""
    folder = tmp_path_factory.mktemp("pair")
    tensors = base_tensors(layers=8, factor=16)
    return write_base(folder / "base", tensors, SHARDS), write_lora(folder / "adapter", tensors, dora=True)


def command(address: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A command of the CLI as a driver in a process of its own: Ray changes the signal handlers of its process."""
    code = "from adapter_merge.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments), "--ray", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


class Killer(threading.Thread):
    """Kills workers that run a task: in turn one at a random moment, and one that has an output file open."""

    def __init__(self, ancestor: int, kills: int, seed: int) -> None:
        super().__init__()
        self.ancestor, self.kills = ancestor, kills
        self.draw = random.Random(seed)
        self.stopped = threading.Event()
        self.at_random = 0
        self.while_writing = 0

    def run(self) -> None:
        while self.at_random + self.while_writing < self.kills and not self.stopped.wait(0.01):
            running = running_tasks(self.ancestor)
            if self.at_random <= self.while_writing:
                self.stopped.wait(self.draw.uniform(0, 0.5))
                self.at_random += bool(running) and kill(self.draw.choice(running))
            else:
                writing = [pid for pid in running if has_open(pid, ".tasks-")]
                self.while_writing += bool(writing) and kill(self.draw.choice(writing))


def with_kills(process: subprocess.Popen[str], ancestor: int, kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Wait for the command while workers are killed: half of them at random, half while they write."""
    seed = random.randrange(1 << 30)
    killer = Killer(ancestor, kills, seed)
    killer.start()
    try:
        printed, _ = process.communicate(timeout=500)
    finally:
        killer.stopped.set()
        killer.join()
    with capsys.disabled():
        print(f" seed {seed}: {killer.at_random} workers killed, {killer.while_writing} while they wrote", end="")
    assert process.returncode == 0, printed
    assert (killer.at_random, killer.while_writing) == (kills // 2, kills // 2)


def manifest_of(output: Path) -> dict[str, object]:
    content = json.loads((output / "adapter_merge.json").read_text())
    for key in ("created", "seal"):
        content.pop(key)
    return dict(content)


def test_a_merge_whose_workers_are_killed(
    tmp_path: Path, cluster: tuple[str, int], pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte-identical to the merge of one process, manifest included; nothing is left beside the output."""
    address, ancestor = cluster
    merge(*pair, tmp_path / "out", MergeOptions(device="cpu"))
    whole = shard_hashes(tmp_path / "out")
    files, content = set(snapshot(tmp_path / "out")), manifest_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    with_kills(command(address, "merge", *pair, "-o", tmp_path / "out"), ancestor, KILLS, capsys)
    assert shard_hashes(tmp_path / "out") == whole
    assert set(snapshot(tmp_path / "out")) == files
    assert manifest_of(tmp_path / "out") == content
    check_integrity(tmp_path / "out", inputs=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_deltas_whose_workers_are_killed(
    tmp_path: Path, cluster: tuple[str, int], pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """delta.safetensors is joined from pieces and is the file that one process writes."""
    address, ancestor = cluster
    delta(*pair, tmp_path / "whole", DeltaOptions(device="cpu"))
    code = (
        "import adapter_merge.api.delta as d; d.PIECE_BYTES = 24 << 20\n"
        "import sys; from adapter_merge.cli.main import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "delta", *map(str, pair), "-o", str(tmp_path / "out"),
         "--ray", address],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    with_kills(process, ancestor, KILLS // 2, capsys)
    name = "delta.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert manifest_of(tmp_path / "out") == manifest_of(tmp_path / "whole")
    check_integrity(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
