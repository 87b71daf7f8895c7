"""Rank-limited factors against a float64 SVD of PEFT's merged weights; budgets, kept scales, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factor_models import (
    base_weights,
    dcft_adapter,
    factor_products,
    load,
    merged_weights,
    peft_adapter,
    peft_model,
    pico_model,
)

from adapter_merge.api.factor import factor
from adapter_merge.api.options import FactorOptions, VerifyOptions, parse_rank
from adapter_merge.api.verify import verify
from adapter_merge.errors import InputError, ParityError
from adapter_merge.factoring import delta_operator
from adapter_merge.formats.stated_settings import ReadOptions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def dora(base: Path) -> Path:
    return peft_adapter(base, base.parent / "dora", use_dora=True)


@pytest.fixture(scope="module")
def dude(base: Path) -> Path:
    return peft_adapter(base, base.parent / "dude", use_dora=True, init_lora_weights="pissa")


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    return peft_adapter(base, base.parent / "lora", rank=8)


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    before, after = base_weights(base), merged_weights(base, adapter)
    return {name: after[name] - before[name] for name in before}


def norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


@pytest.mark.parametrize("kind", ["lora", "dora", "dude"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_rank_is_within_one_percent_of_the_best(
    kind: str, rank: int, base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    adapter: Path = request.getfixturevalue(kind)
    content = factor(base, adapter, tmp_path / "out", FactorOptions(rank=rank)).as_json()
    assert content["exact"] is False and content["form"] == "lora"
    exact, products = deltas(base, adapter), factor_products(tmp_path / "out")
    assert set(products) == set(content["layers"])
    for name, product in products.items():
        delta = exact[name]
        best = norm(torch.linalg.svdvals(delta)[rank:])
        error = norm(delta - product)
        assert best * 0.9999 <= error <= 1.01 * best + 1e-6 * norm(delta)
        line = content["layers"][name]
        assert line["rank"] == rank
        assert line["relative_error"] == pytest.approx(error / norm(delta), rel=1e-3)
        spectral = float(torch.linalg.matrix_norm(delta - product, 2) / torch.linalg.matrix_norm(delta, 2))
        assert line["spectral_error"] == pytest.approx(spectral, rel=2e-2)
        assert line["energy"] == pytest.approx(1 - (error / norm(delta)) ** 2, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_dude_beside_a_rounded_residual(dtype: torch.dtype, tmp_path: Path) -> None:
    base = pico_model(tmp_path / "base", dtype=dtype)
    dude = peft_adapter(base, tmp_path / "dude", use_dora=True, init_lora_weights="pissa")
    reading = ReadOptions(residual_dtype=str(dtype).removeprefix("torch."))
    content = factor(base, dude, tmp_path / "out", FactorOptions(rank=8, reading=reading)).as_json()
    live = peft_model(base, dude)
    for name, product in factor_products(tmp_path / "out").items():
        layer = live.get_submodule(f"base_model.model.{name}")
        residual = layer.base_layer.weight.detach().double()  # type: ignore[union-attr, operator]
        a, b = (layer.get_submodule(f"lora_{side}.default").weight.detach().double() for side in "AB")
        direction = residual + 2 * b @ a
        magnitude = layer.lora_magnitude_vector.default.weight.detach().double()  # type: ignore[union-attr]
        delta = (magnitude / torch.linalg.vector_norm(direction, dim=1))[:, None] * direction - base_weights(base)[name]
        best = norm(torch.linalg.svdvals(delta)[8:])
        assert norm(delta - product) <= 1.01 * best
        assert content["layers"][name]["relative_error"] == pytest.approx(norm(delta - product) / norm(delta), rel=1e-2)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_is_kept_with_the_smallest_rank(energy: float, base: Path, dude: Path, tmp_path: Path) -> None:
    content = factor(base, dude, tmp_path / "out", FactorOptions(rank=energy)).as_json()
    exact = deltas(base, dude)
    for name, product in factor_products(tmp_path / "out").items():
        squares = torch.linalg.svdvals(exact[name]).square()
        smallest = int((torch.cumsum(squares, 0) < energy * squares.sum()).sum()) + 1
        assert 1 - (norm(exact[name] - product) / norm(exact[name])) ** 2 >= energy - 1e-4
        assert smallest <= content["layers"][name]["rank"] <= smallest + 1


@pytest.mark.parametrize("rank", [np.float32(1 - 2**-24), np.float64(1 - 2**-53), np.int64(100)])
def test_a_rank_at_the_edge_gives_the_whole(rank: Any, base: Path, lora: Path, dude: Path, tmp_path: Path) -> None:
    plain = factor(base, lora, tmp_path / "plain", FactorOptions(rank=rank)).as_json()
    assert plain["certificate"]["max_relative_error"] < 1e-6
    assert plain["certificate"]["ranks"][1] <= 8
    scaled = factor(base, dude, tmp_path / "scaled", FactorOptions(rank=rank)).as_json()
    assert scaled["certificate"]["max_relative_error"] < 1e-3
    assert scaled["certificate"]["ranks"][1] <= 48


def test_plain_factors_are_truncated_without_the_base(base: Path, tmp_path: Path) -> None:
    adapter = dcft_adapter(base, tmp_path / "dcft")
    with_base = factor(base, adapter, tmp_path / "one", FactorOptions(rank=2)).as_json()
    without = factor(None, adapter, tmp_path / "two", FactorOptions(rank=2)).as_json()
    assert with_base["layers"] == without["layers"]
    assert {line["route"] for line in without["layers"].values()} == {"cores"}
    one, two = factor_products(tmp_path / "one"), factor_products(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_large_weight_is_read_in_blocks(
    base: Path, dude: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {key: factor(base, dude, tmp_path / f"kept-{key}", FactorOptions(rank=key)).as_json() for key in (3, 0.6)}
    whole = factor(base, dude, tmp_path / "whole").as_json()
    monkeypatch.setattr(delta_operator, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(delta_operator, "BLOCK_BYTES", 4 * 48 * 5)  # five rows
    for key, content in kept.items():
        streamed = factor(base, dude, tmp_path / f"streamed-{key}", FactorOptions(rank=key)).as_json()
        for name, line in content["layers"].items():
            other = streamed["layers"][name]
            assert other["rank"] == line["rank"]
            for figure in ("relative_error", "spectral_error", "relative_delta", "energy"):
                assert other[figure] == pytest.approx(line[figure], rel=1e-3)
    again = factor(base, dude, tmp_path / "again").as_json()
    assert again["certificate"]["max_relative_error"] == pytest.approx(
        whole["certificate"]["max_relative_error"], rel=0.1
    )
    one, two = factor_products(tmp_path / "kept-3"), factor_products(tmp_path / "streamed-3")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("full", [True, False])
def test_lokr_goes_through_its_sides(full: bool, base: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoKrConfig(r=64 if full else 2, alpha=64 if full else 2, target_modules=["q_proj", "down_proj"],
                             task_type="CAUSAL_LM", decompose_both=False)  # fmt: skip
    model = peft.get_peft_model(load(base), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lokr")
    exact = factor(base, tmp_path / "lokr", tmp_path / "exact").as_json()
    assert exact["certificate"]["max_relative_error"] < 1e-6
    assert exact["certificate"]["max_spectral_error"] < 1e-6
    limited = factor(base, tmp_path / "lokr", tmp_path / "limited", FactorOptions(rank=3)).as_json()
    after, before = merged_weights(base, tmp_path / "lokr"), base_weights(base)
    whole, products = factor_products(tmp_path / "exact"), factor_products(tmp_path / "limited")
    assert len(products) == 4
    for name, product in products.items():
        delta = after[name] - before[name]
        assert torch.allclose(whole[name], delta, atol=1e-6)
        best = norm(torch.linalg.svdvals(delta)[3:])
        assert norm(delta - product) == pytest.approx(best, rel=1e-5)
        line = limited["layers"][name]
        assert line["relative_error"] == pytest.approx(best / norm(delta), rel=1e-4)
        spectral = float(torch.linalg.matrix_norm(delta - product, 2) / torch.linalg.matrix_norm(delta, 2))
        assert line["spectral_error"] == pytest.approx(spectral, rel=1e-2)


def test_a_budget_is_kept_and_beats_one_rank_for_all(base: Path, dude: Path, tmp_path: Path) -> None:
    uniform = factor(base, dude, tmp_path / "uniform", FactorOptions(rank=4)).as_json()
    shapes = {name: line["shape"] for name, line in uniform["layers"].items()}
    size = sum(4 * 4 * sum(shape) for shape in shapes.values())
    content = factor(base, dude, tmp_path / "budget", FactorOptions(budget=size / 1e6)).as_json()
    assert sum(4 * line["rank"] * sum(shapes[name]) for name, line in content["layers"].items()) <= size
    exact = deltas(base, dude)

    def lost(folder: Path) -> float:
        return sum(norm(exact[name] - product) ** 2 for name, product in factor_products(folder).items())

    assert lost(tmp_path / "budget") < lost(tmp_path / "uniform")
    assert content["certificate"]["ranks"][0] < content["certificate"]["ranks"][1]
    peft_model(base, tmp_path / "budget")  # rank_pattern and alpha_pattern are PEFT's own


def test_scale_exact_keeps_the_row_scale(base: Path, dude: Path, tmp_path: Path) -> None:
    whole = factor(base, dude, tmp_path / "whole").as_json()
    content = factor(base, dude, tmp_path / "kept", FactorOptions(rank=3, keep_scale=True)).as_json()
    plain = factor(base, dude, tmp_path / "plain", FactorOptions(rank=3)).as_json()
    assert content["form"] == whole["form"] == "lora+row_scale"
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "row_scale.safetensors") for name in ("whole", "kept"))
    for name, scale in one.items():
        assert torch.allclose(scale, two[name], atol=1e-6)
    before, after, got = base_weights(base), merged_weights(base, dude), merged_weights(base, tmp_path / "kept")
    for name, line in content["layers"].items():
        assert line["rank"] == 3
        error = norm(got[name] - after[name]) / norm(after[name] - before[name])  # as PEFT itself loads it
        assert line["relative_error"] == pytest.approx(error, rel=1e-3)
        scale = one[f"base_model.model.{name}.row_scale"].double()[:, None]
        best = norm(torch.linalg.svdvals(after[name] - scale * before[name])[3:])
        assert error * norm(after[name] - before[name]) == pytest.approx(best, rel=1e-3)
    assert content["certificate"]["mean_relative_error"] < plain["certificate"]["mean_relative_error"]


def test_the_same_input_gives_the_same_bytes(base: Path, dude: Path, tmp_path: Path) -> None:
    one = factor(base, dude, tmp_path / "one", FactorOptions(rank=4)).as_json()
    two = factor(base, dude, tmp_path / "two", FactorOptions(rank=4)).as_json()
    file = "adapter_model.safetensors"
    assert one["files"][file] == two["files"][file]
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_max_error_leaves_nothing_behind(base: Path, dude: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="have an error above --max-error") as caught:
        factor(base, dude, tmp_path / "out", FactorOptions(rank=1, max_error=0.01))
    assert "relative error <= 0.01" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    factor(base, dude, tmp_path / "out", FactorOptions(rank=48, max_error=0.01))
    assert json.loads((tmp_path / "out" / "adapter_merge.json").read_text())["options"]["max_error"] == 0.01


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "--rank is wrong"),
        ({"rank": 1.0}, "--rank is wrong"),
        ({"rank": True}, "--rank is wrong"),
        ({"rank": float("nan")}, "--rank is wrong"),
        ({"budget": -1}, "--budget is wrong"),
        ({"budget": 1e-5}, "--budget is too small"),
        ({"rank": 2, "budget": 1.0}, "exclude each other"),
        ({"keep_scale": True}, "--scale exact applies to truncated factors only"),
        ({"calibrate": __file__}, "--calibrate applies to truncated factors only"),
        ({"rank": 2, "calibrate": "no-such.txt"}, "no such file"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], message: str, base: Path, dude: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        factor(base, dude, tmp_path / "out", FactorOptions(**settings))
    assert not (tmp_path / "out").exists()


def test_a_rank_is_read_from_text() -> None:
    assert parse_rank("16") == 16 and isinstance(parse_rank("16"), int)
    assert parse_rank("0.99") == 0.99
    for text in ("0", "-3", "1.0", "0.99999999999999999999", "many", "nan"):
        with pytest.raises(InputError):
            parse_rank(text)


def test_verify_says_how_much_a_truncation_lost(base: Path, dude: Path, tmp_path: Path) -> None:
    """Without logits the best factors of their rank pass: the verdict must not read as if they were the adapter."""
    weights = VerifyOptions(weights_only=True)
    factor(base, dude, tmp_path / "exact")
    assert not verify(base, dude, tmp_path / "exact", weights).as_json()["notes"]
    factor(base, dude, tmp_path / "out", FactorOptions(rank=2))
    report = verify(base, dude, tmp_path / "out", weights)
    worst = max(found["relative_error"] for found in report.as_json()["layers"].values())
    assert worst > 0.01
    assert f"off by up to {worst:.2g} of the trained dW" in report.as_json()["notes"][0]


@pytest.mark.parametrize(
    "narrowed", [{"exclude_modules": ["v_proj"]}, {"layers_to_transform": [1]}, {"layers_to_transform": 0}]
)
def test_only_the_adapted_modules_are_targets(narrowed: dict[str, object], base: Path, tmp_path: Path) -> None:
    """With the training's targets, but not what it left out of them, PEFT adapts more modules, and refuses Mamba's."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **narrowed)
    model = peft.get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "adapter")
    factor(base, tmp_path / "adapter", tmp_path / "factors")
    again = peft.PeftModel.from_pretrained(load(base), tmp_path / "factors")
    assert {name for name, _ in again.named_parameters() if "lora_" in name} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
