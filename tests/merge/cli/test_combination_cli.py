"""Combinations, extraction and the readers' options on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import run
from click.testing import CliRunner
from fuzz_folders import Q, base_model, seeds
from safetensors.torch import load_file, save_file

from adapter_merge.cli.main import group
from adapter_merge.combine.delta_ops import METHODS
from adapter_merge.errors import AdapterMergeError


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
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["options"]["combination"]["weights"] == {"a": 0.7, "b": 0.3}
    assert [entry["name"] for entry in said["adapters"]] == ["a", "b"]
    recipe = "method: ties\ndensity: 0.5\nbase: base\nadapters:\n- {path: b, weight: 0.3}\n- {path: a, weight: 0.7}\n"
    (work / "recipe.yaml").write_text(recipe)
    done = run("merge", "--recipe", work / "recipe.yaml", "-o", work / "two")
    assert done.code == 0, done.err
    one, two = (work / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != (work / "base" / "model.safetensors").read_bytes()


def test_factors_of_a_combination_and_extraction(work: Path) -> None:
    pair = [work / "base", f"a={work / 'a'}", f"b={work / 'b'}"]
    done = run("factor", *pair, "--weight", "a=0.5", "-o", work / "factors")
    assert done.code == 0 and "relative error" in done.out, done.err
    done = run("merge", *pair, "--weight", "a=0.5", "-o", work / "merged")
    assert done.code == 0, done.err
    done = run("merge", work / "base", work / "factors", "-o", work / "again")
    assert done.code == 0, done.err
    one, two = (load_file(work / name / "model.safetensors") for name in ("merged", "again"))
    assert all(float((one[key] - two[key]).abs().max()) < 1e-5 for key in one)
    done = run("extract", work / "base", work / "merged", "--rank", "4", "--row-scale", "-o", work / "extracted")
    assert done.code == 0 and "relative error" in done.out, done.err


def test_options_of_the_readers_arrive(work: Path) -> None:
    done = run("merge", work / "base", work / "k", "--format", "mytransformers", "-o", work / "no")
    assert done.code == 1 and "Traceback" not in done.err
    done = run("merge", work / "base", work / "k", "--format", "kohya", "-o", work / "k-merged")
    assert done.code == 0, done.err
    before, after = load_file(work / "base" / "model.safetensors"), load_file(work / "k-merged" / "model.safetensors")
    assert {key for key in before if not bool((before[key] == after[key]).all())} == {f"{Q}.weight"}


def test_delta_factor_and_verify_take_what_merge_takes(work: Path) -> None:
    stated = [work / "base", f"a={work / 'a'}", f"b={work / 'b'}", "--weight", "a=0.7", "--combine", "ties"]
    stated += ["--density", "0.5"]
    done = run("delta", *stated, "-o", work / "delta", "--json")
    assert done.code == 0 and json.loads(done.out)["options"]["combination"]["method"] == "ties", done.err
    done = run("merge", *stated, "-o", work / "ties")
    assert done.code == 0, done.err
    before, after = (load_file(work / name / "model.safetensors") for name in ("base", "ties"))
    for key, value in load_file(work / "delta" / "delta.safetensors").items():
        assert float((before[key] + value - after[key]).abs().max()) < 1e-6
    for artefact in ("ties", "delta"):
        done = run("verify", *stated[:3], work / artefact, *stated[3:], "--weights-only")
        assert done.code == 0 and "PASS" in done.out, done.out + done.err
        done = run("verify", work / artefact, "--trained", "--weights-only")
        assert done.code == 0 and "PASS" in done.out, done.out + done.err
    done = run("verify", *stated[:3], work / "ties", "--weight", "a=0.6", "--combine", "ties", "--weights-only")
    assert done.code == 1 and "FAIL" in done.out
    done = run("factor", *stated, "--rank", "2", "-o", work / "truncated")
    assert done.code == 0 and "energy kept" in done.out, done.err
    assert "of full rank" in run("factor", *stated, "-o", work / "no").err


def test_densities_may_differ(work: Path) -> None:
    pair = [work / "base", f"a={work / 'a'}", f"b={work / 'b'}", "--combine", "magnitude-prune"]
    done = run("delta", *pair, "--density", "0.5", "--density", "b=0.25", "-o", work / "densities", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)["options"]["combination"]
    assert said["density"] == 0.5 and said["densities"] == {"b": 0.25}
    for wrong in (["x=0.5"], ["a=much"], ["0.5", "--density", "0.4"], ["0"]):
        done = run("delta", *pair, "--density", *wrong, "-o", work / "no")
        assert done.code in (1, 2) and "ensity" in done.err and not (work / "no").exists()


def test_adapters_without_names_go_in_turn(work: Path) -> None:
    done = run("merge", work / "base", work / "a", work / "b", "-o", work / "turns", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["options"]["combination"]["method"] == "in-turn"
    assert said["options"]["combination"]["adapters"] == ["a", "b"]
    named = [work / "base", f"x={work / 'a'}", f"y={work / 'b'}", "--combine", "in-turn"]
    assert run("merge", *named, "-o", work / "named").code == 0
    assert run("merge", work / "base", work / "a", "-o", work / "first").code == 0
    # b's magnitudes are the base's, as those of an adapter that was trained on the merged model would not be
    assert run("merge", work / "first", work / "b", "--force", "-o", work / "second").code == 0
    turns, again, apart = (load_file(work / name / "model.safetensors") for name in ("turns", "named", "second"))
    assert all(bool((turns[key] == again[key]).all()) for key in turns)
    assert all(float((turns[key] - apart[key]).abs().max()) < 1e-6 for key in turns)
    done = run("merge", work / "base", work / "a", work / "a", "-o", work / "twice", "--dry-run", "--json")
    assert [entry["name"] for entry in json.loads(done.out)["adapters"]] == ["a", "a-2"]


def test_a_restored_base_is_proved_by_the_merged_model(work: Path) -> None:
    assert run("merge", work / "base", work / "a", "--keep-preimage", "-o", work / "kept").code == 0
    assert run("restore", work / "kept", "-o", work / "restored").code == 0
    done = run("verify", work / "kept", work / "restored")
    assert done.code == 0 and "bit for bit" in done.out, done.err
    done = run("verify", work / "kept", work / "first" if (work / "first").exists() else work / "kept", "--json")
    assert done.code == 1 and json.loads(done.out)["error"]["kind"] == "FileFormatError"


def test_options_are_given_to_adapters_by_name(work: Path) -> None:
    pair = [work / "base", f"k={work / 'k'}", f"a={work / 'a'}"]
    done = run("merge", *pair, "--format", "k=kohya", "--format", "a=peft", "-o", work / "formats", "--json")
    assert done.code == 0, done.err
    stated = {entry["name"]: entry["stated"] for entry in json.loads(done.out)["adapters"]}
    assert stated == {"a": {"format": "peft"}, "k": {"format": "kohya"}}
    done = run("merge", *pair, "--format", "k=peft", "-o", work / "no")
    assert done.code == 1 and "error" in done.err
    for wrong in (["--format", "x=peft"], ["--alpha", "a=much"], ["--base-kind", "a=other"], ["--magnitudes", "m"]):
        done = run("merge", *pair, *wrong, "-o", work / "no", "--json")
        assert done.code == 2, done.err
        assert json.loads(done.out)["error"]["kind"] == "UsageError"
    assert run("merge", *pair, "--alpha", "a=1", "--alpha", "a=2", "-o", work / "no").code == 2
    assert not (work / "no").exists()


def test_errors_are_json_where_json_is_wanted(work: Path) -> None:
    done = run("merge", work / "base", work / "nowhere", "-o", work / "no", "--json")
    error = json.loads(done.out)["error"]
    assert done.code == 1 and "nowhere" in error["cause"] and error["expected"] and error["kind"] == "InputError"
    assert error["cause"] in done.err and error["problems"][0]["cause"] == error["cause"]
    done = run("merge", work / "base", work / "a", "--json")
    assert done.code == 2 and "--output" in json.loads(done.out)["error"]["cause"]
    assert run("merge", work / "base", work / "nowhere", "-o", work / "no").out == ""


def test_outputs_inside_a_model_are_refused(work: Path) -> None:
    for command in ("merge", "delta", "factor"):
        done = run(command, work / "base", work / "b", "-o", work / "base" / "deep" / "out")
        assert done.code == 1 and "inside the model" in done.err
    done = run("extract", work / "base", work / "base", "-o", work / "base" / "out")
    assert done.code == 1 and "inside the model" in done.err
    assert not (work / "base" / "deep").exists()


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, None, {}], ids=["stale", "null", "empty"])
def test_a_quantization_config_must_be_true(value: object, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    done = run("merge", tmp_path / "base", work / "a", "-o", tmp_path / "out")
    if value:
        assert done.code == 1 and "quantization_config" in done.err and "remove" in done.err
        assert not (tmp_path / "out").exists()
        done = run("delta", tmp_path / "base", work / "a", "-o", tmp_path / "delta")
    assert done.code == 0, done.err


def test_a_quantised_weight_without_its_scales_is_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(quantised))
    state = load_file(tmp_path / "base" / "model.safetensors")
    packed = {**state, "other.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    save_file(packed, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    done = run("merge", tmp_path / "base", work / "a", "-o", tmp_path / "out")
    assert done.code == 1 and "other.qweight" in done.err
    state[f"{Q}.weight"] = state[f"{Q}.weight"].to(torch.int8)
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    done = run("merge", tmp_path / "base", work / "a", "-o", tmp_path / "no")
    assert done.code == 1 and "quantised" in done.err and "unquantised base" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["base", "a=a", "b"],
        ["base", "a=a", "--weight", "x=1"],
        ["base", "a=a", "--weight", "a"],
        ["base", "a", "--combine", "ties"],
        ["base", "a", "b", "--weight", "a=0.5"],
        ["base", "a", "b", "--combine", "ties"],
        ["base", "a=a", "--combine", "in-turn", "--weight", "a=0.5"],
        ["base", "--recipe", "recipe.yaml", "--alpha", "3"],
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
    from adapter_merge.cli.options.inputs import METHODS as OFFERED

    assert OFFERED == METHODS
