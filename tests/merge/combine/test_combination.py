"""Combinations against their definitions in float64 over whole tensors; each adapter's own effect is PEFT's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from combination_oracle import CONFIGS, WEIGHTS, effects, elect, expected, recipe, top, train_all
from pico_bases import gpt2, llama, quiet, train
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.combine.delta_ops import (
    METHODS,
    CombinedEdit,
    Settings,
    WeightedEdit,
    combine_edits,
    combine_forms,
    random_keep,
)
from adapter_merge.combine.recipe import Recipe, read_recipe
from adapter_merge.errors import FileFormatError, InputError, MismatchError
from adapter_merge.methods.block_edits import apply_edit
from adapter_merge.methods.canonical_form import CanonicalForm

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")


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


def run(base: Path, made: Recipe, output: Path, **options: Any) -> dict[str, Tensor]:
    merge(base, made, output, MergeOptions(device="cpu", **options))
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "magnitude-prune", "ties", "breadcrumbs"])
def test_combination_is_its_definition(
    method: str, base: Path, adapters: dict[str, Path], deltas: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    density, gamma = (1.0, 0.0) if method == "linear" else (0.4, 0.05 if method == "breadcrumbs" else 0.0)
    made = recipe(adapters, WEIGHTS, method=method, density=density, gamma=gamma)
    got = run(base, made, tmp_path / "out")
    before = load_file(base / "model.safetensors")
    touched = set().union(*deltas.values())
    for key, value in got.items():
        if key not in touched:
            assert torch.equal(value, before[key])
            continue
        names = [name for name in WEIGHTS if key in deltas[name]]
        parts, weights = [deltas[name][key] for name in names], [WEIGHTS[name] for name in names]
        wanted = expected(method, parts, weights, density, gamma)
        wrong = (got[key].double() - before[key].double() - wanted).abs() > 3e-6
        # Two sizes next to the threshold may change places between float32 and float64.
        assert int(wrong.sum()) <= (0 if method == "linear" else 2 * len(parts)), key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_adapter_at_weight_one_is_its_merge(
    method: str, name: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    merge(base, adapters[name], tmp_path / "merged", MergeOptions(device="cpu"))
    merge(base, recipe(adapters, {name: 1.0}, method=method), tmp_path / "combined", MergeOptions(device="cpu"))
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("merged", "combined"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_gives_the_identical_bytes(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    merge(
        base, recipe(adapters, dict.fromkeys(CONFIGS, 0.0), method=method), tmp_path / "out", MergeOptions(device="cpu")
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_order_workers_and_blocks_change_nothing(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapter_merge.engine import lanes

    density = 1.0 if method == "linear" else 0.5

    def run_once(number: int, order: tuple[str, ...], workers: int) -> Path:
        made = recipe(adapters, {name: WEIGHTS[name] for name in order}, method=method, density=density, seed=3)
        merge(base, made, tmp_path / f"out{number}", MergeOptions(device="cpu", workers=workers))
        return tmp_path / f"out{number}" / "model.safetensors"

    orders = list(itertools.islice(itertools.permutations(WEIGHTS), 0, 24, 11))
    files = [run_once(number, order, 1 + number) for number, order in enumerate(orders)]
    assert len({file.read_bytes() for file in files}) == 1
    # Smaller blocks: the same elements are chosen, but the last bits of a matrix product depend on its height.
    monkeypatch.setattr(lanes, "CPU_BLOCK_BYTES", 1 << 10)
    one, other = load_file(files[0]), load_file(run_once(9, orders[0], 2))
    for key, value in one.items():
        assert int((value - other[key]).abs().gt(1e-6).sum()) <= (0 if "dare" in method else 8), key


def test_dare_drops_and_rescales(
    base: Path, adapters: dict[str, Path], deltas: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    before = load_file(base / "model.safetensors")
    results = []
    for seed in (0, 0, 1):
        made = recipe(adapters, {"lora": 0.5}, method="dare", density=0.25, seed=seed)
        results.append(run(base, made, tmp_path / f"out{len(results)}"))
    dropped = total = 0
    for key, delta in deltas["lora"].items():
        change = (results[0][key] - before[key]).double()
        kept = change != 0
        torch.testing.assert_close(change[kept], (0.5 * delta / 0.25)[kept], atol=2e-6, rtol=0)
        assert torch.equal(results[0][key], results[1][key])
        assert not torch.equal(results[0][key], results[2][key])
        dropped, total = dropped + int((~kept).sum()), total + kept.numel()
    share, deviation = 1 - dropped / total, (0.25 * 0.75 / total) ** 0.5
    assert abs(share - 0.25) < 5 * deviation


def test_random_numbers_are_uniform_and_independent() -> None:
    device = torch.device("cpu")
    whole = random_keep(12345, 0.3, 0, 200_000, device)
    pieces = torch.cat([random_keep(12345, 0.3, first, 20_000, device) for first in range(0, 200_000, 20_000)])
    assert torch.equal(whole, pieces)
    other = random_keep(12346, 0.3, 0, 200_000, device)
    deviation = (0.3 * 0.7 / 200_000) ** 0.5
    assert abs(float(whole.float().mean()) - 0.3) < 5 * deviation
    assert abs(float((whole & other).float().mean()) - 0.09) < 5 * (0.09 * 0.91 / 200_000) ** 0.5
    assert abs(float((whole[1:] & whole[:-1]).float().mean()) - 0.09) < 6 * (0.09 * 0.91 / 200_000) ** 0.5


def test_dare_ties_is_ties_of_the_dropped(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    weights = {"lora": 0.6, "dora": 0.4}
    before = load_file(base / "model.safetensors")
    got = run(base, recipe(adapters, weights, method="dare-ties", density=0.5, seed=9), tmp_path / "both")
    alone = {}
    for name in weights:
        made = recipe(adapters, {name: 1.0}, method="dare", density=0.5, seed=9)
        alone[name] = run(base, made, tmp_path / name)
    for key in before:
        changes = [(alone[name][key] - before[key]).double() for name in weights]
        if any(bool(change.any()) for change in changes):
            expected = elect(changes, list(weights.values()))
            torch.testing.assert_close((got[key] - before[key]).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_column_norms_and_conv1d(method: str, tmp_path: Path) -> None:
    with quiet():
        base = gpt2(tmp_path / "base")
    folders = {}
    for seed, name in enumerate(("a", "b")):
        config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)
        train(base, config, tmp_path / name, seed=seed)
        folders[name] = tmp_path / name
    density = 1.0 if method == "linear" else 0.5
    got = run(base, recipe(folders, {"a": 0.6, "b": 0.4}, method=method, density=density), tmp_path / "out")
    before = load_file(base / "model.safetensors")
    merged = {}
    for name in folders:
        merge(base, folders[name], tmp_path / f"merged-{name}", MergeOptions(device="cpu"))
        merged[name] = load_file(tmp_path / f"merged-{name}" / "model.safetensors")
    for key in before:
        changes = [(merged[name][key] - before[key]).double() for name in folders]
        if not any(bool(change.any()) for change in changes):
            assert torch.equal(got[key], before[key])
            continue
        if method == "ties":
            expected = elect([top(change, int(0.5 * change.numel())) for change in changes], [0.6, 0.4])
        else:
            expected = 0.6 * changes[0] + 0.4 * changes[1]
        assert int(((got[key] - before[key]).double() - expected).abs().gt(3e-6).sum()) <= 4


def test_heads_are_combined_in_delta_space(base: Path, tmp_path: Path) -> None:
    folders = {}
    for seed, name in enumerate(("a", "b")):
        config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
        train(base, config, tmp_path / name, seed=seed)
        folders[name] = tmp_path / name
    got = run(base, recipe(folders, {"a": 0.6, "b": 0.3}), tmp_path / "out")
    before = load_file(base / "model.safetensors")
    heads = [load_file(folders[name] / "adapter_model.safetensors") for name in folders]
    for key in ("lm_head.weight", "model.norm.weight"):
        one, two = (head[f"base_model.model.{key}"].double() for head in heads)
        w0 = before[key].double()
        torch.testing.assert_close(got[key].double(), w0 + 0.6 * (one - w0) + 0.3 * (two - w0), atol=1e-6, rtol=0)


# -- the canonical form of a combination ------------------------------------------------------------------


def test_linear_combination_of_doras_is_a_canonical_form() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 9, dtype=torch.float64)

    def form(rank: int, scaled: bool) -> CanonicalForm:
        magnitude = weight.norm(dim=1) * (1 + 0.2 * torch.rand(12)) if scaled else None
        return CanonicalForm(torch.randn(12, rank).double(), torch.randn(rank, 9).double(), magnitude=magnitude)

    forms, weights = [form(2, True), form(3, False), form(1, True)], [0.7, -0.4, 0.5]
    expected = weight + sum(w * f.delta(weight) for f, w in zip(forms, weights, strict=True))
    got = combine_forms(forms, weights, weight)
    assert got.rank == 6
    torch.testing.assert_close(got.merged(weight), expected)


def test_thresholds_are_exact_over_blocks() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    form = CanonicalForm(torch.randn(40, 2), torch.randn(2, 30))
    delta = form.delta_rows(weight, 0)
    for density in (0.001, 0.01, 0.25, 0.5, 0.999):
        unread: Any = combine_edits([WeightedEdit(form, 2.0, density, 0)], Settings("magnitude-prune", density))
        edit = unread
        assert isinstance(edit, CombinedEdit)
        while edit.needs_pass:
            edit = edit.with_pass_sums(sum(edit.pass_sums(weight[i : i + 7].clone(), i) for i in range(0, 40, 7)))
        expected = 2 * top(delta, int(density * 1200))
        torch.testing.assert_close(edit.delta_rows(weight, 0), expected)
        after = apply_edit(unread, weight)
        torch.testing.assert_close(after, weight + expected)


# -- recipes ------------------------------------------------------------------------------------------------


RECIPE = {
    "method": "ties",
    "density": 0.5,
    "base": "base",
    "adapters": [{"name": "a", "path": "a", "weight": 0.7}, {"name": "b", "path": "b", "density": 0.3}],
}


@pytest.mark.parametrize("suffix", ["yaml", "json", "toml"])
def test_recipe_files(suffix: str, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    text = json.dumps(RECIPE)
    if suffix == "yaml":
        text = "method: ties\ndensity: 0.5\nbase: base\nadapters:\n- {name: a, path: a, weight: 0.7}\n"
        text += "- name: b\n  path: b\n  density: 0.3\n"
    elif suffix == "toml":
        text = 'method = "ties"\ndensity = 0.5\nbase = "base"\n[[adapters]]\nname = "a"\npath = "a"\nweight = 0.7\n'
        text += '[[adapters]]\nname = "b"\npath = "b"\ndensity = 0.3\n'
    file = tmp_path / f"recipe.{suffix}"
    file.write_text(text)
    made = read_recipe(file)
    assert made.settings == Settings("ties", 0.5)
    assert [(i.name, i.weight, i.density) for i in made.ingredients] == [("a", 0.7, None), ("b", 1.0, 0.3)]
    assert Path(made.ingredients[0].path) == tmp_path / "a" and made.base == str(tmp_path / "base")


@pytest.mark.parametrize(
    "change",
    [
        {"weights": 1},
        {"method": "slerp"},
        {"method": ["ties"]},
        {"density": 0},
        {"density": True},
        {"density": "half"},
        {"gamma": 0.1},
        {"seed": 0.5},
        {"seed": 1 << 70},
        {"base": 5},
        {"adapters": []},
        {"adapters": "a"},
        {"adapters": [{"name": "a"}]},
        {"adapters": [{"path": "a", "wieght": 1}]},
        {"adapters": [{"path": "a", "weight": "x"}]},
        {"adapters": [{"path": "a", "weight": float("nan")}]},
        {"adapters": [{"path": "a"}, {"path": "a"}]},
        {"adapters": [{"path": "a", "base_kind": "other"}]},
        {"adapters": [{"path": "a", "format": 3}]},
        {"method": "linear"},
    ],
    ids=repr,
)
def test_wrong_recipes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**RECIPE, **change}))
    with pytest.raises(InputError):
        read_recipe(file)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "\t- x", "!!python/object/apply:os.system [ls]", "1: 2"])
def test_no_recipe_at_all(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(FileFormatError):
        read_recipe(file)


def test_adapters_of_other_bases_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with quiet():
        other = gpt2(tmp_path / "other")
    train(other, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), tmp_path / "a")
    with pytest.raises(MismatchError):
        merge(
            base,
            recipe({**adapters, "a": tmp_path / "a"}, {"lora": 1, "a": 1}),
            tmp_path / "out",
            MergeOptions(device="cpu"),
        )
    assert not (tmp_path / "out").exists()
