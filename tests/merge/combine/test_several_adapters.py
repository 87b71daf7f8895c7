"""Several adapters at once: the delta of a combination, adapters in turn, and what is stated of each one."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import combination_oracle as oracle
import pytest
import torch
from combination_oracle import effects, expected, one_after_the_other, recipe, train_all
from pico import dcft_model, logits, pico_model, save_base, save_dcft_checkpoint
from pico_bases import gpt2, llama, load, quiet, train
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, DeltaOptions, FactorOptions, MergeOptions
from adapter_merge.combine.delta_ops import METHODS, Settings
from adapter_merge.combine.recipe import IN_TURN, Ingredient, Recipe, make_recipe, read_recipe
from adapter_merge.errors import InputError, OutputError
from adapter_merge.formats.stated_settings import ReadOptions

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")

CONFIGS: dict[str, dict[str, Any]] = {
    **oracle.CONFIGS,
    "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "none"},
}
WEIGHTS = {**oracle.WEIGHTS, "head": 0.6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_all(base, tmp_path_factory.mktemp("adapters"), CONFIGS)


@pytest.fixture(scope="module")
def deltas(base: Path, adapters: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    return effects(base, adapters)


def in_turn(*paths: Path) -> Recipe:
    return make_recipe([Ingredient(path.name, str(path)) for path in paths], Settings(IN_TURN))


# -- the delta of a combination ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "magnitude-prune", "ties", "breadcrumbs"])
def test_the_delta_of_a_combination_is_its_definition(
    method: str, base: Path, adapters: dict[str, Path], deltas: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    density, gamma = (1.0, 0.0) if method == "linear" else (0.4, 0.05 if method == "breadcrumbs" else 0.0)
    made = recipe(adapters, WEIGHTS, method=method, density=density, gamma=gamma)
    content = delta(base, made, tmp_path / "delta", DeltaOptions(device="cpu")).as_json()
    assert content["artefact"] == "deltas" and content["options"]["combination"]["weights"] == WEIGHTS
    got = load_file(tmp_path / "delta" / "delta.safetensors")
    assert got.keys() == set().union(*deltas.values())
    for key, value in got.items():
        names = [name for name in WEIGHTS if key in deltas[name]]
        wanted = expected(method, [deltas[n][key] for n in names], [WEIGHTS[n] for n in names], density, gamma)
        wrong = (value.double() - wanted).abs() > 2e-6
        assert int(wrong.sum()) <= (0 if method == "linear" else 2 * len(names)), key


@pytest.mark.parametrize("method", METHODS)
def test_base_and_delta_make_the_merged_model(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    density = 1.0 if method == "linear" else 0.5
    made = recipe(adapters, WEIGHTS, method=method, density=density, seed=5)
    delta(base, made, tmp_path / "delta", DeltaOptions(device="cpu"))
    merge(base, made, tmp_path / "merged", MergeOptions(device="cpu"))
    found = load_file(tmp_path / "delta" / "delta.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {key for key in before if not torch.equal(before[key], after[key])} == found.keys()
    for key, value in found.items():
        torch.testing.assert_close(after[key], before[key] + value, atol=1e-6, rtol=0)


def test_dare_drops_the_same_elements_in_delta_and_merge(
    base: Path, adapters: dict[str, Path], deltas: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    made = recipe(adapters, {"rslora": 0.8}, method="dare", density=0.3, seed=7)
    delta(base, made, tmp_path / "delta", DeltaOptions(device="cpu"))
    for key, value in load_file(tmp_path / "delta" / "delta.safetensors").items():
        kept = value != 0
        assert 0.1 < float(kept.float().mean()) < 0.5
        torch.testing.assert_close(value[kept].double(), (0.8 * deltas["rslora"][key] / 0.3)[kept], atol=2e-6, rtol=0)


def test_nothing_of_a_refused_delta_is_left(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        delta(base, recipe(adapters, {"lora": 1.0}), tmp_path / "out", DeltaOptions(device="cpu"))
    assert not list((tmp_path / "out").iterdir())
    content = delta(
        base, recipe(adapters, {"lora": 1.0}), tmp_path / "dry", DeltaOptions(device="cpu", dry_run=True)
    ).as_json()
    assert content["dry_run"] and not (tmp_path / "dry").exists()


# -- in turn ----------------------------------------------------------------------------------------------------


def check_turns(base: Path, chosen: list[Path], output: Path) -> None:
    merge(base, in_turn(*chosen), output, MergeOptions(device="cpu"))
    wanted = one_after_the_other(base, chosen)
    for key, value in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(value.double(), wanted[key], atol=2e-6, rtol=0, msg=key)


@pytest.mark.parametrize(
    "names", [*itertools.permutations(["lora", "dora", "head"], 2), ("rslora", "dora", "lora", "head")]
)
def test_adapters_in_turn_are_merged_one_after_the_other(
    names: tuple[str, ...], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    check_turns(base, [adapters[name] for name in names], tmp_path / "out")


def test_the_order_of_turns_counts(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    one, other = (in_turn(*(adapters[n] for n in names)) for names in (("lora", "dora"), ("dora", "lora")))
    merge(base, one, tmp_path / "one", MergeOptions(device="cpu"))
    merge(base, other, tmp_path / "other", MergeOptions(device="cpu"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert float((a[key] - b[key]).abs().max()) > 1e-3


def test_column_norms_in_turn(tmp_path: Path) -> None:
    with quiet():
        base = gpt2(tmp_path / "base")
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)
        train(base, config, tmp_path / name, seed=seed)
    check_turns(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_a_head_is_adapted_after_it_was_replaced(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    merge(base, adapters["head"], tmp_path / "first", MergeOptions(device="cpu"))
    train(tmp_path / "first", peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"]), tmp_path / "late", seed=9)
    check_turns(base, [adapters["head"], tmp_path / "late"], tmp_path / "out")


def test_an_adapter_that_starts_from_the_base_cannot_come_later(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    merge(base, in_turn(adapters["dude"], adapters["lora"]), tmp_path / "first", MergeOptions(device="cpu"))
    with pytest.raises(InputError, match="is initialised from the weight"):
        merge(base, in_turn(adapters["lora"], adapters["dude"]), tmp_path / "later", MergeOptions(device="cpu"))
    with pytest.raises(InputError, match="weights do not apply to in-turn"):
        make_recipe([Ingredient("a", "a", 0.5)], Settings(IN_TURN))
    with pytest.raises(InputError, match="a density does not apply to in-turn"):
        make_recipe([Ingredient("a", "a")], Settings(IN_TURN, density=0.5))


# -- what is stated of each adapter --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dcft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a DCFT adapter of it, whose folder does not say its alpha."""
    folder = tmp_path_factory.mktemp("dcft")
    save_base(pico_model("llama"), folder / "base")
    with quiet():
        save_dcft_checkpoint(dcft_model("llama"), folder / "checkpoint", alpha=None)
    convert(
        folder / "checkpoint", folder / "one", ConvertOptions(base=folder / "base", reading=ReadOptions(alpha=32.0))
    )
    return folder / "base", folder / "checkpoint"


def test_options_belong_to_one_adapter_each(dcft: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = dcft
    with pytest.raises(InputError, match="alpha"):
        merge(
            base,
            make_recipe([Ingredient("a", str(checkpoint))], Settings()),
            tmp_path / "no",
            MergeOptions(device="cpu"),
        )
    made = {}
    for alpha in (32.0, 8.0):
        delta(base, checkpoint, tmp_path / f"{alpha}", DeltaOptions(device="cpu", reading=ReadOptions(alpha=alpha)))
        made[alpha] = load_file(tmp_path / f"{alpha}" / "delta.safetensors")
    stated = [
        Ingredient("a", str(checkpoint), 0.5, options={"alpha": 32.0}),
        Ingredient("b", str(checkpoint), 2.0, options={"alpha": 8.0}),
    ]
    content = delta(base, make_recipe(stated, Settings()), tmp_path / "both", DeltaOptions(device="cpu")).as_json()
    assert [entry["stated"] for entry in content["adapters"]] == [{"alpha": 32.0}, {"alpha": 8.0}]
    for key, value in load_file(tmp_path / "both" / "delta.safetensors").items():
        wanted = 0.5 * made[32.0][key].double() + 2 * made[8.0][key].double()
        assert float(wanted.abs().max()) > 1e-3
        torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-5)


def test_a_recipe_states_what_files_do_not_say(dcft: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = dcft
    file = tmp_path / "recipe.json"
    adapters = [{"name": "a", "path": str(checkpoint), "alpha": 8}]
    file.write_text(json.dumps({"base": str(base), "adapters": adapters}))
    merge(None, read_recipe(file), tmp_path / "one", MergeOptions(device="cpu"))
    merge(base, checkpoint, tmp_path / "two", MergeOptions(device="cpu", reading=ReadOptions(alpha=8.0)))
    one, two = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "two"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    wrong = [("alpha", "x"), ("ranknum", True), ("magnitude_axis", "up"), ("residual_dtype", 3), ("init_adapter", 5)]
    for key, value in wrong:
        file.write_text(json.dumps({"base": str(base), "adapters": [{**adapters[0], key: value}]}))
        with pytest.raises(InputError, match=key):
            read_recipe(file)


def test_lost_magnitudes_are_given_to_their_adapter(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(adapters["dora"], tmp_path / "lost")
    tensors = load_file(tmp_path / "lost" / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "magnitude" not in key}
    save_file(kept, tmp_path / "lost" / "adapter_model.safetensors", {"format": "pt"})
    save_file({k: v for k, v in tensors.items() if "magnitude" in k}, tmp_path / "m.safetensors", {"format": "pt"})
    file = tmp_path / "recipe.json"
    lost = {"name": "dora", "path": "lost", "weight": 0.4, "magnitudes": "m.safetensors"}
    file.write_text(json.dumps({"adapters": [lost, {"name": "lora", "path": str(adapters["lora"]), "weight": 0.7}]}))
    merge(base, read_recipe(file), tmp_path / "one", MergeOptions(device="cpu"))
    merge(base, recipe(adapters, {"dora": 0.4, "lora": 0.7}), tmp_path / "two", MergeOptions(device="cpu"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_interrupted_merge_goes_on_only_with_the_same_options(
    dcft: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapter_merge.api import merge as merging

    base, checkpoint = dcft
    original = merging.write_side_files

    def fails(*arguments: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(merging, "write_side_files", fails)
    with pytest.raises(OutputError):
        merge(
            base,
            checkpoint,
            tmp_path / "out",
            MergeOptions(device="cpu", reading=ReadOptions(alpha=32.0), keep_partial=True),
        )
    monkeypatch.setattr(merging, "write_side_files", original)
    assert list(tmp_path.glob(".out*"))
    merge(base, checkpoint, tmp_path / "out", MergeOptions(device="cpu", reading=ReadOptions(alpha=8.0)))
    merge(base, checkpoint, tmp_path / "plain", MergeOptions(device="cpu", reading=ReadOptions(alpha=8.0)))
    one, two = (logits(load(tmp_path / name)) for name in ("out", "plain"))
    assert torch.equal(one, two)


# -- a checkpoint that is base and adapter at once -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_head_that_equals_the_bases_is_no_trained_head(dtype: torch.dtype, tmp_path: Path) -> None:
    """A DCFT checkpoint of an untied decoder holds its lm_head; only the base tells that nobody trained it."""
    save_base(pico_model("llama", dtype), tmp_path / "base")
    with quiet():
        save_dcft_checkpoint(dcft_model("llama", dtype=dtype).float(), tmp_path / "checkpoint")
    content = factor(None, tmp_path / "checkpoint", tmp_path / "alone", FactorOptions(device="cpu")).as_json()
    assert len(content["warnings"]) == 1
    assert "lm_head.weight" in content["warnings"][0] and "With BASE" in content["warnings"][0]
    assert load_file(tmp_path / "alone" / "replacements.safetensors").keys() == {"lm_head.weight"}
    content = factor(
        tmp_path / "base", tmp_path / "checkpoint", tmp_path / "beside", FactorOptions(device="cpu")
    ).as_json()
    assert content["warnings"] == [] and not (tmp_path / "beside" / "replacements.safetensors").exists()
    trained = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    found = load_file(tmp_path / "beside" / "adapter_model.safetensors")
    assert trained.keys() - found.keys() == {"base_model.model.lm_head.weight"}
