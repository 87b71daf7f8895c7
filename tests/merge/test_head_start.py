"""Hashes begun while torch is imported: the same in the end, and believed only of files that stayed as they were."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from merge_models import base_tensors, sha256_of, write_base, write_lora

from adapter_merge.api.merge import merge
from adapter_merge.cli import merge as merge_command
from adapter_merge.cli.main import group
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.engine.execute import execute
from adapter_merge.engine.plan import plan_merge
from adapter_merge.errors import FileFormatError
from adapter_merge.storage.hashing import Begun, HeadStart, file_sha256

CPU = torch.device("cpu")
SHARDS = 2


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(layers=2, factor=2)
    return write_base(tmp_path / "base", tensors, SHARDS), write_lora(tmp_path / "adapter", tensors)


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def begun_to(file: Path, nbytes: int) -> Begun:
    stat = file.stat()
    begun = Begun(file, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), nbytes=nbytes)
    begun.digest.update(file.read_bytes()[:nbytes])
    return begun


def whole(files: list[Path]) -> HeadStart:
    """A head start that has come to the end of every file."""
    head_start = HeadStart(files)
    deadline = time.monotonic() + 60
    while sum(begun.nbytes for begun in head_start._begun.values()) < sum(file.stat().st_size for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return head_start


@pytest.mark.parametrize("dtype", [None, "F32"])
@pytest.mark.parametrize("place", [0, 1, 20_000, -1_001, -1, None], ids=str)
def test_a_hash_goes_on_from_wherever_it_was_begun(
    tmp_path: Path, pair: tuple[Path, Path], place: int | None, dtype: str | None
) -> None:
    """Within the header, within a tensor that is merged or copied, at the end; other dtypes read in other blocks."""
    bound = open_pair(*pair)
    plan = plan_merge(bound.base, (bound,), dtype)
    files = sorted(pair[0].glob("*.safetensors"))
    begun = {file: begun_to(file, len(file.read_bytes()[:place])) for file in files}
    (tmp_path / "out").mkdir()
    finished = execute(plan, tmp_path / "out", CPU, 2, begun=begun)
    for shard in plan.shards:
        assert shard.source is not None
        assert finished[shard.file].source_sha256 == sha256_of(shard.source)
        assert finished[shard.file].sha256 == sha256_of(tmp_path / "out" / shard.file)
    assert len(files) == SHARDS


@pytest.mark.parametrize("link", ["copy", "hardlink"])
def test_a_shard_that_no_adapter_touches_goes_on_as_well(tmp_path: Path, link: str) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors, SHARDS)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    first, last = sorted(set(index.values()))
    adapter = write_lora(tmp_path / "adapter", {name: tensors[name] for name in tensors if index[name] == first})
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    assert [shard.is_copy for shard in plan.shards] == [False, True]
    (tmp_path / "out").mkdir()
    finished = execute(plan, tmp_path / "out", CPU, 2, link=link, begun={base / last: begun_to(base / last, 5_000)})
    assert finished[last].source_sha256 == finished[last].sha256 == sha256_of(base / last)
    assert (tmp_path / "out" / last).samefile(base / last) == (link == "hardlink")


def test_a_file_is_hashed_from_where_it_was_begun(pair: tuple[Path, Path]) -> None:
    file = next(pair[0].glob("*.safetensors"))
    assert file_sha256(file, begun_to(file, 5_000)) == sha256_of(file)


@pytest.mark.parametrize("change", ["bytes", "gone"])
def test_a_base_that_changes_meanwhile_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], cores: None, change: str
) -> None:
    base, adapter = pair
    files = sorted(base.glob("*.safetensors"))
    head_start = whole(files)
    if change == "bytes":
        stat = files[1].stat()
        with files[1].open("r+b") as stream:  # of the same size, in the same place
            stream.seek(-2, os.SEEK_END)
            stream.write(b"\0\0")
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        copy = files[1].read_bytes()
        files[1].unlink()
        files[1].write_bytes(copy)
    with pytest.raises(FileFormatError, match=r"model-00002.*changed while it was read"):
        merge(base, adapter, tmp_path / "out", head_start=head_start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_command_hashes_ahead_and_records_what_every_file_hashes_to(
    tmp_path: Path, pair: tuple[Path, Path], cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    found: list[HeadStart] = []

    def begin(files: list[Path]) -> HeadStart:
        found.append(whole(files))
        return found[0]

    monkeypatch.setattr(merge_command, "HeadStart", begin)
    done = CliRunner().invoke(group, ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    manifest = json.loads(done.stdout)
    used = found[0].stop()
    assert set(used) == set(base.glob("*.safetensors"))
    assert {file.name: manifest["base"]["files"][file.name] for file in used} == {
        file.name: sha256_of(file) for file in used
    }
    assert all(begun.digest.hexdigest() == sha256_of(file) for file, begun in used.items())


@pytest.mark.parametrize("option", ["--no-hashes", "--dry-run", "--shards=1/2"])
def test_nothing_is_hashed_ahead_that_nobody_needs(
    tmp_path: Path, pair: tuple[Path, Path], cores: None, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    asked: list[list[Path]] = []

    def begin(files: list[Path]) -> HeadStart:
        asked.append(list(files))
        return HeadStart(files)

    monkeypatch.setattr(merge_command, "HeadStart", begin)
    done = CliRunner().invoke(group, ["merge", *map(str, pair), "-o", str(tmp_path / "out"), option])
    assert done.exit_code == 0, done.output
    assert asked == [[]]


def test_pipes_and_missing_files_are_left_alone(tmp_path: Path, cores: None) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert HeadStart([tmp_path / "pipe.safetensors", tmp_path / "none.safetensors"]).stop() == {}


def test_one_core_has_no_head_start(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert HeadStart(list(pair[0].glob("*.safetensors"))).stop() == {}
