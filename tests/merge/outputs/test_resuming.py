"""What a failed or split merge has finished is gone on with, when all is the same, and only then."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from merge_models import shard_hashes, snapshot, write_four_shards

from adapter_merge.api import merge as merging
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.engine.execute import FinishedShard, execute
from adapter_merge.errors import InputError, OutputError
from adapter_merge.outputs.integrity import check_integrity
from adapter_merge.outputs.resume_journal import Workplace


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_four_shards(tmp_path)


def stopped_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Make the next merge fail once so many shards are finished."""
    real = Workplace.record
    count = iter(range(100))

    def record(self: Workplace, shard: FinishedShard) -> None:
        if next(count) >= shards:
            raise OSError(5, "the disk fails")
        real(self, shard)

    monkeypatch.setattr(Workplace, "record", record)


def resumed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that later merges compute."""
    made: list[str] = []
    real = execute

    def watched(*arguments: object, **options: object) -> object:
        made.extend(shard.file for shard in options["shards"])  # type: ignore[attr-defined]
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "execute", watched)
    return made


def test_a_failed_run_leaves_its_shards_only_when_asked(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep in (False, True):
        with monkeypatch.context() as patch:
            stopped_after(patch, 2)
            with pytest.raises(OutputError, match="the disk fails"):
                merge(*pair, tmp_path / "out", MergeOptions(keep_partial=keep, workers=1))
        assert (tmp_path / ".out.partial").exists() is keep
    made = resumed(monkeypatch)
    merge(*pair, tmp_path / "out")
    assert len(made) == 2
    merge(*pair, tmp_path / "whole")
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")
    first, second = (
        json.loads((tmp_path / name / "adapter_merge.json").read_text())["layers"] for name in ("out", "whole")
    )
    assert first == second


@pytest.mark.parametrize("change", ["output", "base", "adapter", "options", "version"])
def test_what_was_finished_is_taken_over_only_when_all_is_the_same(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    base, adapter = pair
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(OutputError):
            merge(base, adapter, tmp_path / "out", MergeOptions(keep_partial=True, workers=1))
    finished = sorted(path.stem for path in (tmp_path / ".out.partial" / "journal").glob("model*.json"))
    assert len(finished) == 2
    options: dict[str, str] = {}
    expected = 4
    if change == "output":
        file = tmp_path / ".out.partial" / "model" / finished[0]
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        expected = 3
    elif change == "base":  # a byte in the middle, which no fingerprint of the ends sees, and the old time
        file = base / finished[0]
        times = file.stat()
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        expected = 3
    elif change == "adapter":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9.0}))
    elif change == "options":
        options = {"dtype": "float16"}
    else:
        plan = tmp_path / ".out.partial" / "journal" / "plan.json"
        held = json.loads(plan.read_text())
        held["versions"]["torch"] = "0.1"
        plan.write_text(json.dumps(held))
    made = resumed(monkeypatch)
    merge(base, adapter, tmp_path / "out", MergeOptions(**options))
    assert len(made) == expected
    merge(base, adapter, tmp_path / "whole", MergeOptions(**options))
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")


def test_parts_and_finish_make_what_one_run_makes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "whole")
    made = [
        set(merge(*pair, tmp_path / "out", MergeOptions(part=(number, 3))).as_json()["files"]) for number in (3, 1, 2)
    ]
    assert not (tmp_path / "out").exists()
    assert sum(len(files) for files in made) == len(set.union(*made)) == 4
    merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")
    assert set(snapshot(tmp_path / "out")) == set(snapshot(tmp_path / "whole"))
    check_integrity(tmp_path / "out", inputs=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_finish_names_what_is_missing_and_keeps_what_is_there(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", MergeOptions(part=(1, 2)))
    with pytest.raises(OutputError, match="is not finished") as raised:
        merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    assert len(raised.value.problems) == 2
    with pytest.raises(OutputError, match="another merge"):
        merge(*pair, tmp_path / "out", MergeOptions(part=(2, 2), dtype="float16"))
    merge(*pair, tmp_path / "out", MergeOptions(part=(2, 2)))
    damaged = next((tmp_path / ".out.partial" / "model").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(OutputError, match=damaged.name):
        merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    for part in ((1, 2), (2, 2)):
        merge(*pair, tmp_path / "out", MergeOptions(part=part))
    merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    check_integrity(tmp_path / "out")


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_a_part_that_does_not_exist(tmp_path: Path, pair: tuple[Path, Path], part: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="no such part"):
        merge(*pair, tmp_path / "out", MergeOptions(part=part))
