"""The tasks of `--ray` and what their driver refuses, without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from merge_models import shard_hashes, write_four_shards

from adapter_merge.api import ray_tasks
from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, MergeOptions
from adapter_merge.api.plans import make_plan
from adapter_merge.api.ray_tasks import Job, make_job, write_file
from adapter_merge.cli.main import group
from adapter_merge.combine.combination_settings import Settings
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.engine.execute import execute
from adapter_merge.engine.pieces import divide, join
from adapter_merge.errors import InputError, MissingDependencyError, NumericsError, OutputError


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_four_shards(tmp_path)


def job_of(pair: tuple[Path, Path], folder: Path) -> Job:
    """A job as a driver makes it, with its folders."""
    options = MergeOptions()
    job = make_job(open_pair(*pair), *pair, options, folder)
    (job.folder / job.tasks).mkdir(parents=True)
    return job


def identities(pair: tuple[Path, Path]) -> dict[str, str]:
    options = MergeOptions()
    return {shard.file: shard.identity for shard in make_plan(open_pair(*pair), options).shards}


def test_the_tasks_write_what_a_merge_writes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "whole", MergeOptions(device="cpu"))
    job = job_of(pair, tmp_path / "folder")
    for file, identity in identities(pair).items():
        assert write_file(job, file, identity)["finished"].file == file
    assert shard_hashes(job.folder) == shard_hashes(tmp_path / "whole")
    assert list((job.folder / job.tasks).iterdir()) == []


def test_a_combination_of_adapters_whose_folders_have_one_name(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "other" / "adapter")
    file = tmp_path / "other" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2}))
    recipe = make_recipe([Ingredient("a", str(adapter)), Ingredient("b", str(file.parent))], Settings())
    merge(base, recipe, tmp_path / "whole", MergeOptions(device="cpu"))
    bound = open_pair(base, recipe)
    job = make_job(bound, base, recipe, MergeOptions(), tmp_path / "folder")
    (job.folder / job.tasks).mkdir(parents=True)
    for shard in make_plan(bound, MergeOptions()).shards:
        assert "finished" in write_file(job, shard.file, shard.identity)
    assert shard_hashes(job.folder) == shard_hashes(tmp_path / "whole")


def test_a_task_begins_anew_after_one_that_was_killed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    job = job_of(pair, tmp_path / "folder")
    file, identity = next(iter(identities(pair).items()))
    killed = job.folder / job.tasks / f"{file}.0"
    killed.mkdir()
    (killed / file).write_bytes(b"half")
    result = write_file(job, file, identity)
    assert shard_hashes(job.folder)[file] == result["finished"].sha256
    assert not killed.exists()


def test_a_task_that_is_held_for_dead_places_no_half_written_file(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(pair, tmp_path / "folder")
    file, identity = next(iter(identities(pair).items()))

    def write_half(plan: Any, folder: Path, *others: Any, **options: Any) -> Any:
        (folder / file).write_bytes(b"half")
        raise NumericsError("the second attempt is under way when the first renames")

    def write_whole(*arguments: Any, **options: Any) -> Any:
        finished = execute(*arguments, **options)
        monkeypatch.setattr("adapter_merge.engine.execute.execute", write_half)
        assert write_file(job, file, identity)["error"] == "NumericsError"
        return finished

    monkeypatch.setattr("adapter_merge.engine.execute.execute", write_whole)
    assert write_file(job, file, identity)["error"] == "OutputError"
    assert not (job.folder / file).exists()


def test_a_machine_with_other_inputs_writes_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    job = job_of(pair, tmp_path / "folder")
    file, identity = next(iter(identities(pair).items()))
    other = replace(job, identity=tuple((name, "0" if name in ("base", "torch") else v) for name, v in job.identity))
    refused = write_file(other, file, identity)
    assert refused["error"] == "MismatchError"
    assert ["another torch" in p["cause"] or "another base" in p["cause"] for p in refused["problems"]] == [True] * 2
    refused = write_file(job, file, "0")
    assert "plans it in another way" in refused["problems"][0]["cause"]
    assert list(job.folder.glob("*.safetensors")) == []


def test_an_output_that_machines_do_not_share(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A machine with a folder of the same path on a disk of its own is noticed, on either side."""
    job = job_of(pair, tmp_path / "folder")
    file, identity = next(iter(identities(pair).items()))
    (job.folder / job.tasks).rmdir()
    refused = write_file(job, file, identity)
    assert refused["error"] == "OutputError"
    assert "machines share" in refused["problems"][0]["hint"]
    with pytest.raises(OutputError, match="this machine does not see it"):
        ray_tasks._check_visible(job.folder / file, 10, "host")


def test_a_task_runs_in_any_folder(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, adapter = (Path(os.path.relpath(path)) for path in pair)
    recipe = make_recipe([Ingredient("a", str(adapter), 0.5)], Settings())
    job = make_job(open_pair(base, recipe), base, recipe, MergeOptions(), Path("folder"))
    assert (job.base, job.adapter.ingredients[0].path) == tuple(map(str, pair))  # type: ignore[union-attr]
    assert job.folder == tmp_path / "folder"


@pytest.mark.parametrize("limit", [1, 30_000, 1 << 30])
def test_joined_pieces_are_the_file(tmp_path: Path, pair: tuple[Path, Path], limit: int) -> None:
    delta(*pair, tmp_path / "whole", DeltaOptions(device="cpu"))
    plan = make_plan(open_pair(*pair), DeltaOptions())
    (whole,) = plan.shards
    pieces = divide(whole, limit)
    assert len(pieces) == {1: len(whole.jobs), 1 << 30: 1}.get(limit, len(pieces))
    folder = tmp_path / "pieces"
    folder.mkdir()
    import torch

    execute(plan, folder, torch.device("cpu"), shards=pieces)
    digest = join(folder, whole, pieces)
    assert shard_hashes(folder) == shard_hashes(tmp_path / "whole") == {whole.file: digest}


def test_what_excludes_ray(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = MergeOptions(ray="auto", part=(1, 2), keep_preimage=True, device="cuda:1")
    with pytest.raises(InputError) as raised:
        merge(*pair, tmp_path / "out", options)
    assert len(raised.value.problems) == 3
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="needs the package ray") as missing:
        delta(*pair, tmp_path / "out", DeltaOptions(ray="auto"))
    assert "[ray]" in str(missing.value.problems[0].hint)
    shown = CliRunner().invoke(group, ["merge", *map(str, pair), "-o", str(tmp_path / "out"), "--ray", "auto"])
    assert shown.exit_code == 1
    assert not (tmp_path / "out").exists()
