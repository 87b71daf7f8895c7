"""Errors as people see them: many of one kind as one, the conclusion first, swapped and misspelt inputs recognised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import make_models, run
from safetensors.torch import save_file

from adapter_merge.cli.printing.problem_groups import group_problems
from adapter_merge.errors import Problem
from adapter_merge.files.nearest_path import nearest_path

LAYERS, OUT, IN = 30, 8, 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 30 layers, one of another width, and an adapter of the first on 60 weights."""
    folder = make_models(tmp_path_factory.mktemp("work"), "lora")
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(LAYERS) for p in "qv"]
    for name, width in (("deep", 8), ("wide", 16)):
        (folder / name).mkdir()
        weights = {f"{key}.weight": torch.randn(width, width) for key in names}
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    adapter = folder / "adapters" / "german"
    adapter.mkdir(parents=True)
    factors = {f"base_model.model.{key}.lora_A.weight": torch.randn(2, IN) for key in names}
    factors |= {f"base_model.model.{key}.lora_B.weight": torch.randn(OUT, 2) for key in names}
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_sixty_problems_are_one_line_after_the_conclusion(work: Path) -> None:
    pair = [work / "wide", work / "adapters/german", "-o", work / "x"]
    done = run("merge", *pair)
    lines = done.err.splitlines()
    assert done.code == 1 and len(lines) <= 8
    assert "does not belong to this base" in lines[0] and "60 of its 60" in lines[0]
    flood = next(line for line in lines if "60 times" in line)
    assert flood.count("model.layers.") == 3
    assert any("expected: (16, 16)" in line for line in lines) and any("got: (8, 8)" in line for line in lines)
    loud = run("merge", *pair, "-v").err
    assert loud.count("the adapter's shape is not the weight's") == 60 and "times" not in loud
    error = json.loads(run("merge", *pair, "--json").out)["error"]
    assert len(error["problems"]) == 60 and "does not belong to this base" in error["cause"]
    assert run("inspect", work / "adapters/german", "--base", work / "wide").err.count("\n") <= 8
    assert "times" in run("merge", *pair).err  # -v of the run before is forgotten


def test_what_differs_stays_apart() -> None:
    shapes = [Problem(f"a.b{i}.c: another shape", str(i), "x", "the hint") for i in range(9)]
    other = [Problem("no space"), Problem("a.b.c: NaN"), Problem("a.b.d: NaN")]
    shown = group_problems([*shapes, *other])
    assert [problem.cause for problem in shown[1:]] == ["no space", "a.b.c: NaN", "a.b.d: NaN"]
    assert shown[0].cause == "9 times: another shape: a.b0.c, a.b1.c, a.b2.c, ..."
    assert shown[0].expected == "0, 1, 2, ..." and shown[0].got == "x" and shown[0].hint == "the hint"
    assert group_problems([Problem("the same")] * 4)[0].cause == "4 times: the same"
    assert group_problems([]) == []


def test_swapped_inputs_are_recognised(work: Path) -> None:
    for command in ("merge", "delta", "factor"):
        done = run(command, work / "lora", work / "base", "-o", work / "x")
        assert done.code == 1 and "swapped?" in done.err
        assert f"hint: adapter-merge {command} {work / 'base'} {work / 'lora'}" in done.err
    done = run("export", work / "lora", work / "base", "-o", work / "x")
    assert done.code == 1 and "swapped?" in done.err
    swapped = run("merge", work / "lora", work / "lora", "-o", work / "x").err
    assert "the first argument must be the base model" in swapped
    assert not (work / "x").exists()


def test_the_nearest_path_is_proposed(work: Path) -> None:
    for wrong, right in (
        ("adapters/germn", "adapters/german"),
        ("adpters/german", "adapters/german"),
        ("lroa", "lora"),
    ):
        done = run("merge", work / "base", work / wrong, "-o", work / "x")
        assert done.code == 1 and f"did you mean {work / right}?" in done.err, done.err
    assert "did you mean" in run("inspect", work / "lora2").err
    assert "did you mean" not in run("inspect", work / "something-else").err
    assert nearest_path(work / "lora") is None


def test_adapters_inside_a_folder_are_proposed(work: Path) -> None:
    done = run("merge", work / "deep", work / "adapters", "-o", work / "x")
    assert done.code == 1 and f"hint: {work / 'adapters'}/german" in done.err


def test_a_trivial_mistake_does_not_load_torch(work: Path) -> None:
    code = "import sys; from adapter_merge.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    for arguments in (["merge", "base", "./lroa", "-o", "x"], ["merge", "lora", "base", "-o", "x"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=work)
        assert done.returncode == 1 and done.stdout.strip() == "False", done.stderr
