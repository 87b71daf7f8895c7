"""Factors of a combination and factors out of two checkpoints, loaded by PEFT and measured against dense weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from combination_oracle import SOME, recipe, train_all
from pico_bases import error, gpt2, llama, load, logits, mixtral, quiet, train
from safetensors.torch import load_file, save_file

from adapter_merge.api.delta import delta
from adapter_merge.api.extract import extract, low_rank, scaled_low_rank
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, ExtractOptions, FactorOptions, MergeOptions
from adapter_merge.combine.delta_ops import METHODS
from adapter_merge.errors import InputError, MismatchError, NumericsError, ParityError, UnsupportedError

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    configs: dict[str, dict[str, Any]] = {
        "lora": {"r": 3, "target_modules": [*SOME, "embed_tokens"]},
        "rslora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
        "dora": {"r": 2, "use_dora": True, "target_modules": SOME},
        "dude": {"r": 2, "use_dora": True, "init_lora_weights": "pissa", "target_modules": ["q_proj"]},
    }
    return train_all(base, tmp_path_factory.mktemp("adapters"), configs)


@pytest.mark.parametrize(
    "weights",
    [{"lora": 0.7, "rslora": 0.4}, {"lora": 0.7, "dora": -0.5}, {"rslora": 0.3, "dora": 0.6, "dude": 0.5}],
    ids=["plain", "one with magnitudes", "two with magnitudes"],
)
def test_linear_factors_are_exact(
    weights: dict[str, float], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    made = recipe(adapters, weights)
    content = factor(base, made, tmp_path / "factors", FactorOptions(device="cpu")).as_json()
    assert content["exact"] and all(layer["relative_error"] < 1e-6 for layer in content["layers"].values())
    assert content["form"] == ("lora" if "dora" not in weights else "lora+row_scale")
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base), tmp_path / "factors").eval()
    assert error(logits(live), logits(load(tmp_path / "merged"))) < 2e-5


def test_truncated_factors_say_their_error(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(adapters, {"rslora": 0.7, "dora": 0.6}, method="ties", density=0.5)
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    errors = []
    for rank in (4, 16, 0.95):
        folder = tmp_path / f"factors-{rank}"
        content = factor(base, made, folder, FactorOptions(rank=rank, device="cpu")).as_json()
        tensors = load_file(folder / "adapter_model.safetensors")
        for module, layer in content["layers"].items():
            delta = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
            a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
            got = float((delta - b @ a).norm() / delta.norm())
            assert got == pytest.approx(layer["relative_error"], abs=1e-4)
            assert rank != 0.95 or got**2 <= 0.05 + 1e-6
        errors.append(sum(layer["relative_error"] for layer in content["layers"].values()))
    assert errors[1] < errors[0]
    with pytest.raises(InputError, match="full rank"):
        factor(base, made, tmp_path / "no", FactorOptions(device="cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_truncated_factors_of_every_method(method: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": method, "density": 1.0 if method == "linear" else 0.5, "seed": 4}
    settings |= {"gamma": 0.05} if method == "breadcrumbs" else {}
    made = recipe(adapters, {"lora": 0.6, "rslora": 0.3, "dora": 0.5, "dude": -0.4}, **settings)
    delta(base, made, tmp_path / "delta", DeltaOptions(device="cpu"))
    dense = load_file(tmp_path / "delta" / "delta.safetensors")
    for rank in (3, 32):
        folder = tmp_path / f"{rank}"
        content = factor(base, made, folder, FactorOptions(rank=rank, device="cpu")).as_json()
        assert content["form"] == "lora" and not content["exact"]
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, change in dense.items():
            module, change = key.removesuffix(".weight"), change.double()
            stem = f"base_model.model.{module}.lora_"
            if f"{stem}A.weight" in tensors:
                got = tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double()
            else:
                got = (tensors[f"{stem}embedding_B"].double() @ tensors[f"{stem}embedding_A"].double()).T
            error = float((change - got).norm() / change.norm())
            singular = torch.linalg.svdvals(change)
            best = float(singular[rank:].norm() / singular.norm())
            assert error == pytest.approx(content["layers"][module]["relative_error"], abs=2e-5)
            assert best - 1e-6 <= error <= 1.02 * best + 2e-5, module


def test_heads_and_biases_are_combined_beside_the_factors(tmp_path: Path) -> None:
    with quiet():
        base = llama(tmp_path / "base", bias=True)
    configs: dict[str, dict[str, Any]] = {
        "a": {"r": 3, "target_modules": SOME, "modules_to_save": ["lm_head"], "bias": "lora_only"},
        "b": {"r": 2, "target_modules": ["o_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]},
        "c": {"r": 2, "target_modules": SOME, "use_dora": True},
    }
    for seed, (name, arguments) in enumerate(configs.items()):
        train(base, peft.LoraConfig(**arguments), tmp_path / name, seed=seed)
    for weights in ({"a": 0.6, "b": 0.5}, {"a": 0.6, "b": -0.5, "c": 0.7}):
        made = recipe({name: tmp_path / name for name in configs}, weights)
        merge(base, made, tmp_path / f"merged{len(weights)}", MergeOptions(device="cpu"))
        content = factor(base, made, tmp_path / f"factors{len(weights)}", FactorOptions(device="cpu")).as_json()
        assert content["exact"] and content["form"] == ("lora" if len(weights) == 2 else "lora+row_scale")
        wanted = load_file(tmp_path / f"merged{len(weights)}" / "model.safetensors")
        before = load_file(base / "model.safetensors")
        changed = {key for key in wanted if not torch.equal(wanted[key], before[key])}
        heads = load_file(tmp_path / f"factors{len(weights)}" / "replacements.safetensors")
        assert heads.keys() == {key for key in changed if key.endswith("bias")} | {"lm_head.weight"}
        for key, value in heads.items():
            torch.testing.assert_close(value, wanted[key], atol=1e-6, rtol=0)
        with quiet():
            live = peft.PeftModel.from_pretrained(load(base), tmp_path / f"factors{len(weights)}").eval()
        assert error(logits(live), logits(load(tmp_path / f"merged{len(weights)}"))) < 2e-5


def test_the_certificate_runs_combined_heads_end_to_end(tmp_path: Path) -> None:
    with quiet():
        base = llama(tmp_path / "base", bias=True)
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(
            r=3, target_modules=SOME, modules_to_save=["lm_head"], bias="lora_only", use_dora=name == "a"
        )
        train(base, config, tmp_path / name, seed=seed)
    made = recipe({name: tmp_path / name for name in "ab"}, {"a": 0.6, "b": 0.5})
    found = factor(base, made, tmp_path / "factors", FactorOptions(end_to_end=True, device="cpu")).as_json()[
        "certificate"
    ]["end_to_end"]
    assert found["max_dlogit"] < 1e-4 and found["effect"] > 0.1
    assert found["greedy_equal"] == found["greedy_total"]


def test_bare_parameters_have_no_factors(tmp_path: Path) -> None:
    with quiet():
        base = mixtral(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    train(base, config, tmp_path / "a")
    with pytest.raises(UnsupportedError, match="more than low-rank factors"):
        factor(base, recipe({"a": tmp_path / "a"}, {"a": 0.5}), tmp_path / "no", FactorOptions(rank=4, device="cpu"))


def test_row_scales_serve_without_the_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(adapters, {"rslora": 0.3, "dora": 0.6, "dude": 0.5})
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    factor(base, made, tmp_path / "factors", FactorOptions(device="cpu"))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    tensors = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    scales = load_file(tmp_path / "factors" / "row_scale.safetensors")
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert scales.keys() == {f"base_model.model.{module}.row_scale" for module in changed}
    for module in changed:
        stem = f"base_model.model.{module}"
        product = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        got = scales[f"{stem}.row_scale"].double()[:, None] * (before[f"{module}.weight"].double() + product)
        torch.testing.assert_close(got, after[f"{module}.weight"].double(), atol=2e-6, rtol=0)
    # o_proj has no magnitudes of its own: PEFT still needs one, that changes nothing
    only = [value for key, value in scales.items() if ".o_proj." in key]
    assert only and all(torch.equal(value, torch.ones_like(value)) for value in only)


def test_a_budget_and_an_exact_scale_hold_for_combinations(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    made = recipe(adapters, {"rslora": 0.3, "dora": 0.6, "dude": 0.5})
    plain = factor(base, made, tmp_path / "plain", FactorOptions(rank=4, device="cpu")).as_json()["certificate"]
    exact = factor(base, made, tmp_path / "scaled", FactorOptions(rank=4, keep_scale=True, device="cpu")).as_json()
    assert exact["form"] == "lora+row_scale"
    assert exact["certificate"]["mean_relative_error"] < 0.7 * plain["mean_relative_error"]
    budget = factor(base, made, tmp_path / "budget", FactorOptions(budget=0.012, device="cpu")).as_json()
    size = sum(v.nbytes for v in load_file(tmp_path / "budget" / "adapter_model.safetensors").values())
    assert size <= 12_000 and budget["certificate"]["mean_relative_error"] < 1
    with pytest.raises(ParityError):
        factor(base, made, tmp_path / "no", FactorOptions(rank=1, max_error=1e-3, device="cpu"))


def test_a_rounded_residual_is_owned_up_to(tmp_path: Path) -> None:
    with quiet():
        base = llama(tmp_path / "base", dtype=torch.bfloat16)
    dude = peft.LoraConfig(r=2, use_dora=True, init_lora_weights="pissa", target_modules=["q_proj"])
    train(base, dude, tmp_path / "dude")
    train(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "lora")
    made = recipe({name: tmp_path / name for name in ("dude", "lora")}, {"dude": 0.5, "lora": 1.0})
    content = factor(base, made, tmp_path / "factors", FactorOptions(device="cpu")).as_json()
    assert not content["exact"] and "rounded to half precision" in content["warnings"][0]
    delta(base, made, tmp_path / "delta", DeltaOptions(device="cpu"))
    before = load_file(base / "model.safetensors")
    tensors = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    scales = load_file(tmp_path / "factors" / "row_scale.safetensors")
    for key, change in load_file(tmp_path / "delta" / "delta.safetensors").items():
        stem, weight = f"base_model.model.{key.removesuffix('.weight')}", before[key].double()
        product = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        got = scales[f"{stem}.row_scale"].double()[:, None] * (weight + product) - weight
        found = float((got - change.double()).norm() / change.double().norm())
        assert found == pytest.approx(content["layers"][key.removesuffix(".weight")]["relative_error"], rel=0.05)
        assert found > 1e-4


def test_conv1d_factors(tmp_path: Path) -> None:
    with quiet():
        base = gpt2(tmp_path / "base")
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=name == "a")
        train(base, config, tmp_path / name, seed=seed)
    made = recipe({name: tmp_path / name for name in "ab"}, {"a": 0.5, "b": 0.8})
    factor(base, made, tmp_path / "factors", FactorOptions(device="cpu"))
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base), tmp_path / "factors").eval()
    assert error(logits(live), logits(load(tmp_path / "merged"))) < 2e-5


def test_column_scales_have_truncated_factors_only(tmp_path: Path) -> None:
    """An embedding's DoRA scales its columns: no row scale, no LoRA says that."""
    with quiet():
        base = llama(tmp_path / "base")
    train(base, peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True), tmp_path / "a")
    train(base, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "b")
    made = recipe({name: tmp_path / name for name in "ab"}, {"a": 0.5, "b": 0.5})
    with pytest.raises(InputError, match="scales of input columns"):
        factor(base, made, tmp_path / "no", FactorOptions(device="cpu"))
    content = factor(base, made, tmp_path / "factors", FactorOptions(rank=32, device="cpu")).as_json()
    assert content["certificate"]["max_relative_error"] < 1e-5
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base), tmp_path / "factors").eval()
    assert error(logits(live), logits(load(tmp_path / "merged"))) < 2e-5


def test_what_has_no_factors_is_refused(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    train(base, config, tmp_path / "a")
    with pytest.raises(UnsupportedError, match="more than low-rank factors"):
        factor(base, recipe({"a": tmp_path / "a"}, {"a": 1.0}), tmp_path / "no", FactorOptions(device="cpu"))


# -- extraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_scale", [False, True])
def test_extraction_finds_a_merged_lora_again(row_scale: bool, base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=[*SOME, "embed_tokens", "lm_head"], bias="none")
    train(base, config, tmp_path / "a")
    merge(base, tmp_path / "a", tmp_path / "tuned", MergeOptions(device="cpu"))
    content = extract(
        base, tmp_path / "tuned", tmp_path / "found", ExtractOptions(rank=3, row_scale=row_scale, device="cpu")
    ).as_json()
    assert len(content["layers"]) == 8
    assert all(layer["relative_error"] < 1e-4 for layer in content["layers"].values())
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base), tmp_path / "found").eval()
    assert error(logits(live), logits(load(tmp_path / "tuned"))) < 1e-4
    merge(base, tmp_path / "found", tmp_path / "again", MergeOptions(device="cpu"))
    assert error(logits(load(tmp_path / "again")), logits(load(tmp_path / "tuned"))) < 1e-4


def test_row_scales_fit_a_dora_that_a_lora_cannot(base: Path, tmp_path: Path) -> None:
    train(base, peft.LoraConfig(r=2, target_modules=SOME, use_dora=True), tmp_path / "a")
    merge(base, tmp_path / "a", tmp_path / "tuned", MergeOptions(device="cpu"))
    plain = extract(base, tmp_path / "tuned", tmp_path / "plain", ExtractOptions(rank=2, device="cpu")).as_json()[
        "layers"
    ]
    scaled = extract(
        base, tmp_path / "tuned", tmp_path / "scaled", ExtractOptions(rank=2, row_scale=True, device="cpu")
    ).as_json()["layers"]
    for name, layer in plain.items():
        assert scaled[name]["relative_error"] < 0.7 * layer["relative_error"]


def test_a_pure_row_scale_needs_no_rank() -> None:
    torch.manual_seed(0)
    before = torch.randn(20, 12)
    after = before * (1 + 0.3 * torch.rand(20))[:, None]
    up, down, scale = scaled_low_rank(before, after, 1)
    assert float((torch.addmm(before, up, down) * scale[:, None] - after).norm() / (after - before).norm()) < 1e-5
    up, down = low_rank(before, after, 1)
    assert float((before + up @ down - after).norm() / (after - before).norm()) > 0.5


def test_row_scales_are_never_worse() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        before, after = torch.randn(14, 10), torch.randn(14, 10)
        up, down = low_rank(before, after, 2)
        plain = float((before + up @ down - after).norm())
        up, down, scale = scaled_low_rank(before, after, 2)
        assert float((torch.addmm(before, up, down) * scale[:, None] - after).norm()) <= plain * (1 + 1e-6)


def test_norms_and_new_heads_are_carried_over(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "tuned")
    state = load_file(base / "model.safetensors")
    torch.manual_seed(0)
    state["model.norm.weight"] = state["model.norm.weight"] + 0.1
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"] + 0.1 * torch.randn(48, 32)
    save_file(state, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    content = extract(base, tmp_path / "tuned", tmp_path / "found", ExtractOptions(rank=32, device="cpu")).as_json()
    assert content["carried_over"] == ["model.norm.weight"]
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base), tmp_path / "found").eval()
    assert error(logits(live), logits(load(tmp_path / "tuned"))) < 1e-4


def test_extraction_refuses(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same values"):
        extract(base, base, tmp_path / "no", ExtractOptions(device="cpu"))
    with quiet():
        other = gpt2(tmp_path / "other")
    with pytest.raises(MismatchError):
        extract(base, other, tmp_path / "no", ExtractOptions(device="cpu"))
    shutil.copytree(base, tmp_path / "nan")
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError):
        extract(base, tmp_path / "nan", tmp_path / "no", ExtractOptions(device="cpu"))
    for rank in (0, -1, 1.5, True):
        with pytest.raises(InputError):
            extract(base, tmp_path / "nan", tmp_path / "no", ExtractOptions(rank=rank, device="cpu"))
    assert not (tmp_path / "no").exists()
