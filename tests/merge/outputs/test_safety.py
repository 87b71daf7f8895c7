"""Nothing lost, nothing half-written: kills, full disks, locks, interrupts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from merge_models import base_tensors, shard_hashes, snapshot, write_base, write_four_shards, write_lora

from adapter_merge.api import merge as merging
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.engine.execute import execute
from adapter_merge.engine.plan import plan_merge
from adapter_merge.errors import FileFormatError, OutputError
from adapter_merge.files.locks import locked
from adapter_merge.outputs.integrity import check_integrity

pytestmark = pytest.mark.preloaded("torch")
HERE = Path(__file__).parents[1]  # faults.py is beside the folders


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_four_shards(tmp_path)


@pytest.fixture
def left(tmp_path: Path) -> Iterator[None]:
    """At the end nothing but whole folders stands in tmp_path."""
    yield
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def driver(*arguments: object, timeout: float = 300) -> dict[str, int]:
    """Run faults.py, which kills and starves real merges, and return what it counted."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted


# -- kills ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path: Path) -> None:
    """Whatever the moment, the output is not there or whole; reruns get to the same bytes."""
    kills = int(os.environ.get("ADAPTER_MERGE_KILLS", "50"))
    tensors = base_tensors(layers=6, factor=6)
    base = write_base(tmp_path / "base", tensors, 6)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    merge(base, adapter, tmp_path / "whole")
    counted = driver("kill", base, adapter, tmp_path / "out", tmp_path / "whole", kills, timeout=60 + 6 * kills)
    assert counted["killed"] >= kills
    assert counted["resumed"] > 0
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")
    check_integrity(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_kill_while_an_output_is_replaced(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """With --overwrite the old or the new model stands there at any moment."""
    base, adapter = pair
    merge(base, adapter, tmp_path / "old", MergeOptions(dtype="float32"))
    merge(base, adapter, tmp_path / "new")
    merge(base, adapter, tmp_path / "out", MergeOptions(dtype="float32"))
    counted = driver("replace", base, adapter, tmp_path / "out", tmp_path / "old", tmp_path / "new", 15)
    assert counted["killed"] >= 15


# -- faults --------------------------------------------------------------------------------------------------


def test_file_size_limit(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    counted = driver("limit", *pair, tmp_path / "out", 20_000)
    assert counted == {"code": 1}
    assert not (tmp_path / "out").exists()


def test_full_disk(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A real file system of 256 KiB, and a check for room that was passed before the disk filled up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mount.stderr.strip()}")
    try:
        counted = driver("full", *pair, disk / "out")
        assert counted == {"code": 1}
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_small_a_disk_is_found_before_anything_is_written(
    tmp_path: Path, pair: tuple[Path, Path], left: None, monkeypatch: pytest.MonkeyPatch
) -> None:

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="too small"):
        merge(*pair, tmp_path / "out")


def test_a_shard_that_ends_too_early_is_found_before_and_during_the_merge(
    tmp_path: Path, pair: tuple[Path, Path], left: None
) -> None:
    base, adapter = pair
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    victim = base / "model-00002-of-00004.safetensors"
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size - 1000)
    (tmp_path / "direct").mkdir()
    with pytest.raises(FileFormatError, match="model-00002"):
        execute(plan, tmp_path / "direct", torch.device("cpu"), 2)
    with pytest.raises(FileFormatError, match="model-00002"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A fast merge would be done before the signal comes; and what a shell starts in the background ignores this signal.
SLOW_DISK = """
import signal, time
from adapter_merge.engine import chunked_file as chunks
from adapter_merge.cli import main as cli
signal.signal(signal.SIGINT, signal.default_int_handler)
write = chunks.ChunkedFile._write
chunks.ChunkedFile._write = lambda self, chunk: (time.sleep(0.05), write(self, chunk))
cli.main()
"""


@pytest.mark.slow
@pytest.mark.preloaded()  # the signal is for the process itself
def test_interrupt_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = base_tensors(layers=4, factor=24)
    base = write_base(tmp_path / "base", tensors, 4)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    arguments = ["-c", SLOW_DISK, "merge", base, adapter, "-o", tmp_path / "out"]
    running = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while running.poll() is None and not list(tmp_path.glob(".out.partial/model/*")):
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_unreadable_base_is_reported(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    base, adapter = pair
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    victim = base / "model-00001-of-00004.safetensors"
    victim.unlink()
    (tmp_path / "direct").mkdir()
    with pytest.raises(FileFormatError, match="cannot be read"):
        execute(plan, tmp_path / "direct", torch.device("cpu"), 2)


# -- locks, modes --------------------------------------------------------------------------------------------


def test_two_runs_on_one_output_exclude_each_other(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="another run"):
        merge(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "out")


def test_many_runs_at_once_make_one_output(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    counted = driver("race", *pair, tmp_path / "out", 6)
    assert counted["done"] == 1
    assert counted["refused"] == 5
    check_integrity(tmp_path / "out")


def test_parts_run_at_the_same_time(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    counted = driver("parts", *pair, tmp_path / "out", 4)
    assert counted == {"done": 4}
    merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    merge(*pair, tmp_path / "whole")
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")


def test_an_output_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.workplace

    def late(output: Path, *arguments: object, **options: object) -> object:
        output.mkdir()
        (output / "precious").write_text("mine")
        return real(output, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "workplace", late)
    with pytest.raises(OutputError, match="exists already"):
        merge(*pair, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_foreign_folders_and_inputs_are_never_replaced(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    base, adapter = pair
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="not written by adapter-merge"):
        merge(base, adapter, tmp_path / "own", MergeOptions(overwrite=True))
    before = snapshot(base)
    for output in (base, adapter, tmp_path):
        with pytest.raises(OutputError):
            merge(base, adapter, output, MergeOptions(overwrite=True))
    assert snapshot(base) == before


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_follow_the_umask(
    tmp_path: Path, pair: tuple[Path, Path], mask: int, file_mode: int, folder_mode: int
) -> None:
    for file in tmp_path.rglob("*.safetensors"):  # safetensors 0.8 makes them 0600, and so would the output's be
        file.chmod(0o644)
    old = os.umask(mask)
    try:
        merge(*pair, tmp_path / "out", MergeOptions(keep_preimage=True))
    finally:
        os.umask(old)
    out = tmp_path / "out"
    for path in (out, *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path
