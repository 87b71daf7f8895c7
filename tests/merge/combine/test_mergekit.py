"""mergekit's YAML against mergekit's own formulas, written out in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_folders import base_model, seeds
from safetensors.torch import load_file

from adapter_merge.api.merge import merge
from adapter_merge.combine.recipe import read_recipe
from adapter_merge.errors import AdapterMergeError, UnsupportedError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    base_model(folder / "base")
    for name in ("lora", "heads"):
        (folder / name).mkdir()
        for file, data in seeds()["lora"].items():
            (folder / name / file).write_bytes(data)
    config = json.loads((folder / "heads" / "adapter_config.json").read_text())
    (folder / "heads" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, down in factors.items():
        if key.endswith("lora_A.weight"):
            up = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            kind = name.split(".")[-2]
            alpha = config.get("alpha_pattern", {}).get(kind, config["lora_alpha"])
            rank = config.get("rank_pattern", {}).get(kind, config["r"])
            found[name] = up.double() @ down.double() * (alpha / rank)
    return found


@pytest.mark.parametrize(
    ("method", "common", "weights", "expected"),
    [
        ("task_arithmetic", "", (0.7, 0.4), (0.7, 0.4)),
        ("task_arithmetic", "{normalize: true}", (0.7, 0.1), (0.875, 0.125)),
        ("task_arithmetic", "{lambda: 0.5}", (1.0, 2.0), (0.5, 1.0)),
        ("linear", "", (3.0, 1.0), (0.75, 0.25)),
        ("linear", "{normalize: false}", (0.6, 0.4), (0.6, 0.4)),
        ("task_arithmetic", "{weight: 0.25}", (None, None), (0.25, 0.25)),
    ],
)
def test_the_same_model_as_its_formula(
    method: str, common: str, weights: tuple[Any, Any], expected: tuple[float, float], work: Path, tmp_path: Path
) -> None:
    lines = [f"merge_method: {method}", f"base_model: {work / 'base'}", "dtype: float32", "models:"]
    if common:
        lines.insert(1, f"parameters: {common}")
    for name, weight in zip(("lora", "heads"), weights, strict=True):
        lines.append(f"- model: {work / 'base'}+{work / name}")
        lines += [f"  parameters: {{weight: {weight}}}"] if weight is not None else []
    (tmp_path / "config.yml").write_text("\n".join(lines))
    recipe = read_recipe(tmp_path / "config.yml")
    assert recipe.dtype == "float32"
    merge(None, recipe, tmp_path / "out")
    before, after = load_file(work / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    first, second = deltas(work / "lora"), deltas(work / "heads")
    for name, weight in before.items():
        wanted = weight.double()
        for share, delta in zip(expected, (first, second), strict=True):
            wanted = wanted + share * delta[name] if name in delta else wanted
        assert float((after[name].double() - wanted).abs().max()) < 2e-6, name
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_base_itself_counts_in_a_linear_mean(work: Path, tmp_path: Path) -> None:
    base = work / "base"
    (tmp_path / "c.yaml").write_text(
        f"merge_method: linear\nmodels:\n- {{model: {base}, parameters: {{weight: 3}}}}\n"
        f"- {{model: '{base}+{work / 'lora'}', parameters: {{weight: 1}}}}\n"
    )
    recipe = read_recipe(tmp_path / "c.yaml")
    assert [item.weight for item in recipe.ingredients] == [0.25] and recipe.base == str(base)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\nmodels: [{model: b+a, parameters: {weight: 1, density: 0.5}}]",
        "merge_method: dare_ties\nmodels: [{model: b+a}]",
        "merge_method: slerp\nmodels: [{model: b+a}]",
        "merge_method: linear\nslices: []\nmodels: [{model: b+a}]",
        "merge_method: linear\nmodels: [{model: b+a}, {model: c+a}]",
        "merge_method: linear\nmodels: [{model: b+a}, {model: other}]",
        "merge_method: linear\nmodels: [{model: b+a, parameters: {weight: [0.1, 0.9]}}]",
        "merge_method: linear\nmodels: [{model: b+a, parameters: {weight: 1, density: 0.5}}]",
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: b+a}]",
        "merge_method: linear\ntokenizer_source: union\nmodels: [{model: b+a}]",
        "merge_method: linear\nmodels: [{model: b+a, parameters: {weight: 1}}, {model: b+c, parameters: {weight: -1}}]",
        "merge_method: linear\ndtype: int8\nmodels: [{model: b+a}]",
        "merge_method: linear\nmodels: [{model: b, parameters: {weight: 1}}]",
        "merge_method: linear\nmodels: [{model: b+a}]",  # mergekit: a weight is required
        "merge_method: linear\nparameters: {normalize: false}\nmodels: [{model: b+a, parameters: {weight: 0.5}}]",
        "merge_method: linear\nparameters: {lambda: 0.5}\nmodels: [{model: b+a, parameters: {weight: 1}}]",
        "merge_method: linear\nmodels: 3",
    ],
)
def test_what_means_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(AdapterMergeError) as caught:
        read_recipe(tmp_path / "config.yml")
    if "ties" in text or "slerp" in text:
        assert isinstance(caught.value, UnsupportedError)


def test_the_command_takes_it_as_mergekit_does(work: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from adapter_merge.cli.main import group

    (tmp_path / "config.yml").write_text(
        f"merge_method: linear\ndtype: bfloat16\nmodels:\n- model: {work / 'base'}+{work / 'lora'}\n"
        "  parameters: {weight: 1}\n"
    )
    done = CliRunner().invoke(group, ["merge", str(tmp_path / "config.yml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    made = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    wanted = load_file(work / "base/model.safetensors")["model.layers.0.self_attn.q_proj.weight"].double()
    wanted += deltas(work / "lora")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(made["model.layers.0.self_attn.q_proj.weight"], wanted.bfloat16())
