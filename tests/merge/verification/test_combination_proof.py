"""verify of what several adapters made: it passes for the real thing, and fails for anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from combination_oracle import SOME, WEIGHTS, effects, expected, one_after_the_other, recipe, train_all
from pico_bases import gpt2, llama, load, logits, quiet, train
from safetensors.torch import load_file, save_file

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.restore import restore
from adapter_merge.api.verify import verify
from adapter_merge.combine.delta_ops import METHODS, Settings, WeightedEdit
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.combine.recipe import IN_TURN, Ingredient, make_recipe
from adapter_merge.errors import FileFormatError, InputError
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.outputs.integrity import check_restored, inputs_of
from adapter_merge.verification.combination_definition import defined_delta
from adapter_merge.verification.live_model import trained_model

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": [*SOME, "embed_tokens"]},
    "rslora": {"r": 6, "use_rslora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": SOME},
    "dude": {"r": 4, "use_dora": True, "init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
}
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp("base") / "base", dtype=request.param)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_all(base, tmp_path_factory.mktemp("adapters"), CONFIGS)


def damage(folder: Path, file: str, name: str = Q) -> None:
    """One element of one tensor, a little."""
    tensors = load_file(folder / file)
    tensors[name] = tensors[name].clone()
    tensors[name][1, 2] += 0.05
    save_file(tensors, folder / file, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_merged_models_and_deltas_are_proved(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": method, "density": 1.0 if method == "linear" else 0.5, "seed": 3}
    settings |= {"gamma": 0.02} if method == "breadcrumbs" else {}
    made = recipe(adapters, WEIGHTS, **settings)
    merge(base, made, tmp_path / "merge", MergeOptions(device="cpu"))
    delta(base, made, tmp_path / "delta", DeltaOptions(device="cpu"))
    for folder, file in ((tmp_path / "merge", "model.safetensors"), (tmp_path / "delta", "delta.safetensors")):
        report = verify(base, made, folder, VerifyOptions(generated=4)).as_json()
        assert report["passed"], report["problems"]
        assert Q in report["layers"] and report["logits"]["greedy_total"] > 0
        other = verify(
            base, recipe(adapters, {**WEIGHTS, "dora": 0.5}, **settings), folder, VerifyOptions(weights_only=True)
        ).as_json()
        assert not other["passed"]
        damage(folder, file)
        broken = verify(base, made, folder, VerifyOptions(weights_only=True)).as_json()
        assert not broken["passed"] and Q in broken["problems"][0]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lora", "dora"), ("dora", "rslora", "lora")])
def test_adapters_in_turn_are_proved(
    names: tuple[str, ...], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    made, other = (
        make_recipe([Ingredient(name, str(adapters[name])) for name in order], Settings(IN_TURN))
        for order in (names, names[::-1])
    )
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    assert verify(base, made, tmp_path / "merged", VerifyOptions(generated=4)).as_json()["passed"]
    assert not verify(base, other, tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()["passed"]


@pytest.mark.slow
def test_factors_of_a_combination_are_proved(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(adapters, {"lora": 0.7, "rslora": 0.5})
    factor(base, made, tmp_path / "factors", FactorOptions(device="cpu"))
    report = verify(base, made, tmp_path / "factors", VerifyOptions(generated=4)).as_json()
    assert report["passed"], report["problems"]
    damage(
        tmp_path / "factors", "adapter_model.safetensors", f"base_model.model.{Q.removesuffix('weight')}lora_B.weight"
    )
    assert not verify(base, made, tmp_path / "factors", VerifyOptions(weights_only=True)).as_json()["passed"]


# -- the reference itself, against PEFT ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "magnitude-prune", "breadcrumbs"])
def test_the_live_reference_is_what_peft_says(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    density, gamma = (1.0, 0.0) if method == "linear" else (0.4, 0.05 if method == "breadcrumbs" else 0.0)
    bound = open_pair(base, recipe(adapters, WEIGHTS, method=method, density=density, gamma=gamma))
    got = trained_model(bound, torch.float64).state_dict()
    before, own = load(base, torch.float64).state_dict(), effects(base, adapters)
    for key, value in got.items():
        names = [name for name in WEIGHTS if key in own[name]]
        wanted = before[key]
        if names:
            parts = [own[name][key] for name in names]
            wanted = wanted + expected(method, parts, [WEIGHTS[name] for name in names], density, gamma)
        # PEFT finds DoRA's norms and PiSSA's factors in the base's dtype and float32; an edge may tip over.
        assert int(((value - wanted).abs() > 5e-6).sum()) <= (0 if method == "linear" else 2 * len(names)), key


def test_the_live_reference_in_turn_is_what_peft_says(base: Path, adapters: dict[str, Path]) -> None:
    order = ["dora", "lora", "rslora"]
    made = make_recipe([Ingredient(name, str(adapters[name])) for name in order], Settings(IN_TURN))
    got = trained_model(open_pair(base, made), torch.float64).state_dict()
    wanted = one_after_the_other(base, [adapters[name] for name in order])
    for key, value in got.items():
        torch.testing.assert_close(value, wanted[key], atol=5e-6, rtol=0, msg=key)


@pytest.mark.slow
def test_conv1d_and_biases(tmp_path: Path) -> None:
    with quiet():
        base = gpt2(tmp_path / "base")
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(
            r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=name == "a", lora_bias=name == "b"
        )
        train(base, config, tmp_path / name, seed=seed)
    made = recipe({name: tmp_path / name for name in "ab"}, {"a": 0.6, "b": 0.5})
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    report = verify(base, made, tmp_path / "merged", VerifyOptions(generated=4)).as_json()
    assert report["passed"] and any(name.endswith("bias") for name in report["layers"])
    with quiet():
        models = [load(tmp_path / "merged"), trained_model(open_pair(base, made))]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=2e-5, rtol=0)
    chain = make_recipe([Ingredient(name, str(tmp_path / name)) for name in "ba"], Settings(IN_TURN))
    wanted = one_after_the_other(base, [tmp_path / name for name in "ba"])
    got = trained_model(open_pair(base, chain), torch.float64).state_dict()
    for key, value in got.items():  # the norms of columns are those of the weight that the first adapter has changed
        torch.testing.assert_close(value, wanted[key], atol=5e-6, rtol=0, msg=key)
    merge(base, chain, tmp_path / "chain", MergeOptions(device="cpu"))
    assert verify(base, chain, tmp_path / "chain", VerifyOptions(weights_only=True)).passed


def test_only_elements_beside_an_edge_are_unsure() -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 20, dtype=torch.float64)
    form = CanonicalForm(torch.randn(30, 2).double(), torch.randn(2, 20).double())
    delta_of = form.delta(weight)
    for method in ("magnitude-prune", "breadcrumbs", "ties", "dare", "linear"):
        parts = [WeightedEdit(form, w, 0.5, key) for key, w in enumerate((0.5, 0.4))]
        _, unsure = defined_delta([delta_of, delta_of + 0.1], parts, Settings(method, 0.5, 0.0))
        assert int(unsure.sum()) <= 8


# -- from the manifest alone ---------------------------------------------------------------------------------------


def test_a_manifest_leads_back_to_its_inputs(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    own = {name: tmp_path / name for name in ("lora", "dora")}
    for name, folder in own.items():
        shutil.copytree(adapters[name], folder)
    made = recipe(own, {"lora": 0.7, "dora": 0.3}, method="ties", density=0.5)
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    delta(base, own["dora"], tmp_path / "delta", DeltaOptions(device="cpu"))
    for artefact in ("merged", "delta"):
        found_base, found, kind, options = inputs_of(tmp_path / artefact)
        assert verify(
            found_base, found, tmp_path / artefact, VerifyOptions(base_kind=kind, reading=options, weights_only=True)
        ).as_json()["passed"]
    assert inputs_of(tmp_path / "merged")[1] == make_recipe(
        [Ingredient(n, str(own[n]), w, None, "original", {}) for n, w in (("lora", 0.7), ("dora", 0.3))],
        Settings("ties", 0.5),
    )
    damage(own["dora"], "adapter_model.safetensors", f"base_model.model.{Q.removesuffix('weight')}lora_A.weight")
    with pytest.raises(FileFormatError, match="differs from the recorded file"):
        inputs_of(tmp_path / "merged")
    shutil.rmtree(own["dora"])
    with pytest.raises(InputError, match="no longer exists"):
        inputs_of(tmp_path / "merged")


def test_a_restored_base_is_proved(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    merge(base, recipe(adapters, WEIGHTS), tmp_path / "merged", MergeOptions(device="cpu", keep_preimage=True))
    restore(tmp_path / "merged", tmp_path / "again")
    count = check_restored(tmp_path / "merged", tmp_path / "again")
    assert count == len(json.loads((tmp_path / "merged" / "adapter_merge.json").read_text())["base"]["files"])
    damage(tmp_path / "again", "model.safetensors")
    with pytest.raises(FileFormatError, match="differs from the recorded file"):
        check_restored(tmp_path / "merged", tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").rename(tmp_path / "again" / "other.safetensors")
    with pytest.raises(FileFormatError, match="missing") as caught:
        check_restored(tmp_path / "merged", tmp_path / "again")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_deltas_are_held_to_one_rounding(
    dtype: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    delta(base, adapters["lora"], tmp_path / "delta", DeltaOptions(device="cpu", dtype=dtype))
    report = verify(base, adapters["lora"], tmp_path / "delta", VerifyOptions(weights_only=True)).as_json()
    assert report["passed"] and report["half_precision"], report["problems"]
