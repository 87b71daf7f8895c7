"""Combinations, extraction and the readers' options on the command line, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_merge.merge.cli import group
from adapter_merge.merge.combination import METHODS
from adapter_merge.merge.errors import AdapterMergeError
from click.testing import CliRunner
from fuzz_folders import Q, base_model, seeds
from safetensors.torch import load_file


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from adapter_merge.merge.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    base_model(folder / "base")
    for kind, name in (("lora", "a"), ("dora", "b"), ("kohya", "k")):
        (folder / name).mkdir()
        for file, data in seeds()[kind].items():
            (folder / name / file).write_bytes(data)
    return folder


def test_combination_by_flags_and_by_recipe(work: Path) -> None:
    flags = ["--weight", "a=0.7", "--weight", "b=0.3", "--combine", "ties", "--density", "0.5"]
    done = run("merge", work / "base", f"a={work / 'a'}", f"b={work / 'b'}", *flags, "-o", work / "one", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["options"]["combination"]["weights"] == {"a": 0.7, "b": 0.3}
    assert [entry["name"] for entry in said["adapters"]] == ["a", "b"]
    recipe = "method: ties\ndensity: 0.5\nbase: base\nadapters:\n- {path: b, weight: 0.3}\n- {path: a, weight: 0.7}\n"
    (work / "recipe.yaml").write_text(recipe)
    done = run("merge", "--recipe", work / "recipe.yaml", "-o", work / "two")
    assert done.returncode == 0, done.stderr
    one, two = (work / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != (work / "base" / "model.safetensors").read_bytes()


def test_factors_of_a_combination_and_extraction(work: Path) -> None:
    pair = [work / "base", f"a={work / 'a'}", f"b={work / 'b'}"]
    done = run("factor", *pair, "--weight", "a=0.5", "-o", work / "factors")
    assert done.returncode == 0 and "relative error" in done.stdout, done.stderr
    done = run("merge", *pair, "--weight", "a=0.5", "-o", work / "merged")
    assert done.returncode == 0, done.stderr
    done = run("merge", work / "base", work / "factors", "-o", work / "again")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(work / name / "model.safetensors") for name in ("merged", "again"))
    assert all(float((one[key] - two[key]).abs().max()) < 1e-5 for key in one)
    done = run("extract", work / "base", work / "merged", "--rank", "4", "--row-scale", "-o", work / "extracted")
    assert done.returncode == 0 and "relative error" in done.stdout, done.stderr


def test_options_of_the_readers_arrive(work: Path) -> None:
    done = run("merge", work / "base", work / "k", "--format", "mytransformers", "-o", work / "no")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = run("merge", work / "base", work / "k", "--format", "kohya", "-o", work / "k-merged")
    assert done.returncode == 0, done.stderr
    before, after = load_file(work / "base" / "model.safetensors"), load_file(work / "k-merged" / "model.safetensors")
    assert {key for key in before if not bool((before[key] == after[key]).all())} == {f"{Q}.weight"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["base", "a=a", "b"],
        ["base", "a=a", "--weight", "x=1"],
        ["base", "a=a", "--weight", "a"],
        ["base", "a", "--combine", "ties"],
        ["base", "a=a", "--combine", "slerp"],
        ["base", "a=a", "--density", "2", "--combine", "dare"],
        ["base", "a=a", "--recipe", "recipe.yaml"],
        ["base", "a=nowhere"],
        [],
    ],
    ids=" ".join,
)
def test_half_a_combination_is_refused(arguments: list[str], work: Path) -> None:
    known = {"base", "a", "b", "recipe.yaml"}
    real = [str(work / a) if a in known else a.replace("a=a", f"a={work / 'a'}") for a in arguments]
    done = CliRunner().invoke(group, ["merge", *real, "-o", str(work / "nothing")])
    assert done.exit_code == 2 or isinstance(done.exception, AdapterMergeError)
    assert not (work / "nothing").exists()


def test_the_command_line_knows_every_method() -> None:
    from adapter_merge.merge.commands_combine import METHODS as OFFERED

    assert OFFERED == METHODS
