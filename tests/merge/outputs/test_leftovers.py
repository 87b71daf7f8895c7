"""What killed runs leave: removed by the next command on that name and by doctor --clean, and nothing else is."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from merge_models import base_tensors, write_base, write_lora

from adapter_merge.api.convert import convert
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.cli.main import group
from adapter_merge.errors import OutputError
from adapter_merge.files.locks import MARK, locked
from adapter_merge.outputs.integrity import check_integrity
from adapter_merge.outputs.leftovers import clear_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(layers=1)
    return write_base(tmp_path / "base", tensors, 2), write_lora(tmp_path / "adapter", tensors)


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


def dead_run(folder: Path, name: str, *files: str) -> None:
    """What a run of `name` leaves that was killed with these files in its staging folder."""
    (folder / f".{name}.lock").write_bytes(MARK)
    (folder / f".{name}.partial").mkdir()
    for file in files:
        path = folder / f".{name}.partial" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_the_next_command_on_a_finished_output(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    dead_run(tmp_path, "out", "journal/plan.json")
    for content in (MARK, b""):  # which a loss of power may take
        (tmp_path / ".out.lock").write_bytes(content)
        with pytest.raises(OutputError, match="exists already"):
            convert(pair[1], tmp_path / "out")
        assert hidden(tmp_path) == set()
    check_integrity(tmp_path / "out")


def test_finished_shards_stay_for_the_next_run_of_that_merge(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    dead_run(tmp_path, "out", "journal/plan.json", "journal/model.safetensors.json", "model/model.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        merge(*pair, tmp_path / "out")
    assert hidden(tmp_path) == {".out.partial"}
    merge(*pair, tmp_path / "out", MergeOptions(overwrite=True))
    assert hidden(tmp_path) == set()


@pytest.mark.parametrize("names", [(), ("journal/model.safetensors.json",), ("split", "journal/plan.json")])
def test_a_removal_that_failed_half_way(names: tuple[str, ...], tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The lock is gone, and part of the staging folder."""
    merge(*pair, tmp_path / "out")
    dead_run(tmp_path, "out", *names)
    (tmp_path / ".out.lock").unlink()
    with pytest.raises(OutputError, match="exists already"):
        merge(*pair, tmp_path / "out")
    assert hidden(tmp_path) == set()


def test_doctor_removes_what_is_dead_and_ours(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / ".old.old")  # killed between the two steps of a replacement
    merge(*pair, tmp_path / "parts", MergeOptions(part=(1, 2)))
    dead_run(tmp_path, "one", "adapter_model.safetensors")
    dead_run(tmp_path, "two", "journal/plan.json", "journal/a.json", "model/a")
    (tmp_path / ".two.lock").unlink()
    (tmp_path / ".two.partial" / "more").symlink_to(pair[0])  # removed as a link
    (tmp_path / (".partial-" + "a" * 64)).mkdir()
    (tmp_path / ("a" * 64 + ".lock")).touch()
    done = CliRunner().invoke(group, ["doctor", "--clean", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    found = {Path(item["path"]).name: item["kept"] for item in json.loads(done.stdout)["leftovers"]}
    assert found.pop(".parts.partial") == "parts of a split merge: merge --finish joins them"
    assert found == dict.fromkeys(
        [".old.old", ".one.partial", ".one.lock", ".two.partial", ".partial-" + "a" * 64, "a" * 64 + ".lock"], ""
    )
    assert hidden(tmp_path) == {".parts.partial"} and not (tmp_path / ("a" * 64 + ".lock")).exists()
    check_integrity(tmp_path / "old")
    assert (pair[0] / "config.json").is_file()
    merge(*pair, tmp_path / "parts", MergeOptions(part=(2, 2)))
    merge(*pair, tmp_path / "parts", MergeOptions(finish=True))
    assert clear_folder(tmp_path) == []


def test_what_lives_or_is_not_ours_stays(tmp_path: Path) -> None:
    dead_run(tmp_path, "alive", "adapter_model.safetensors")
    (tmp_path / ".foreign.lock").touch()  # as other programs make them
    (tmp_path / ".foreign.partial").mkdir()
    (tmp_path / ".foreign.partial" / "thesis.tex").write_text("years")
    (tmp_path / ".foreign.old").mkdir()
    (tmp_path / ("b" * 64 + ".lock")).touch()  # the hub's cache has such ones
    (tmp_path / "elsewhere" / "journal").mkdir(parents=True)
    (tmp_path / "elsewhere" / "journal" / "plan.json").write_text("{}")
    (tmp_path / ".link.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".linked.lock").symlink_to(tmp_path / ".alive.lock")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with locked(tmp_path / "alive"):
        assert clear_folder(tmp_path) == []
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert not (tmp_path / ".alive.lock").exists()


def test_nothing_is_written_through_a_link_in_place_of_the_staging_folder(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, job in (("one", lambda out: merge(*pair, out)), ("two", lambda out: convert(pair[1], out)),
                      ("three", lambda out: merge(*pair, out, MergeOptions(part=(1, 1))))):  # fmt: skip
        (tmp_path / f".{name}.partial").symlink_to(elsewhere)
        job(tmp_path / name)
        assert list(elsewhere.iterdir()) == []
    (tmp_path / ".four.lock").symlink_to(elsewhere / "lock")
    with pytest.raises(OutputError, match=r"four: cannot be written"):
        convert(pair[1], tmp_path / "four")
    assert list(elsewhere.iterdir()) == []


def test_a_lock_that_is_held_elsewhere_is_not_ours_to_remove(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    dead_run(tmp_path, "out")
    fd = os.open(tmp_path / ".out.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    with pytest.raises(OutputError, match="exists already"):
        merge(*pair, tmp_path / "out")
    assert hidden(tmp_path) == {".out.lock", ".out.partial"}
    os.close(fd)
