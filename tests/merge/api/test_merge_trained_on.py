"""QLoRA on an unquantised checkpoint: the weights that bitsandbytes made of it on loading, and the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from pico_bases import train
from quantised_bases import config_of, quantised
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, InspectOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import InputError, UnsupportedError
from adapter_merge.formats.stated_settings import ReadOptions

TARGETS = ["q_proj", "down_proj"]
NF4 = ReadOptions(trained_on="nf4-double")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """The stored nf4 base, the plain base that it was made of, and bitsandbytes' dequantised weights."""
    folder, dense = quantised("nf4", tmp_path_factory.mktemp("base") / "nf4")
    return folder, folder.with_name("nf4-plain"), dense


@pytest.fixture(scope="module")
def make(work: tuple[Path, Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def adapter(base: Path | None = None, **settings: object) -> Path:
        folder = tmp_path_factory.mktemp("adapter") / "a"
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **settings)
        train(base or work[1], config, folder, scale=0.05)
        return folder

    return adapter


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_it_is_the_merge_into_the_stored_nf4_base(
    work: tuple[Path, Path, dict[str, Tensor]], make: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers quantised the plain base when it saved the other one; DoRA's norms are of the quantised weights.

    bitsandbytes' kernel for CPUs, which did it, misses the nearest nested code of one absmax in a thousand.
    """
    stored, plain, dense = work
    lora, dora = make(), make(use_dora=True)
    for number, adapter in enumerate((lora, dora)):
        merge(plain, adapter, tmp_path / f"a{number}", MergeOptions(reading=NF4))
        merge(stored, adapter, tmp_path / f"b{number}", MergeOptions(write_as="bfloat16"))
        one, two = tensors_of(tmp_path / f"a{number}"), tensors_of(tmp_path / f"b{number}")
        assert one.keys() == two.keys()
        for name in one:
            assert float((one[name] != two[name]).float().mean()) < 0.02, name
            assert torch.allclose(one[name], two[name], rtol=0.02, atol=1e-3), name
    found = tensors_of(tmp_path / "a0")
    name = "model.layers.1.mlp.up_proj.weight"  # not adapted, and quantised at training
    assert float((found[name] != dense[name]).float().mean()) < 0.02
    assert not torch.equal(found[name], tensors_of(plain)[name])
    assert config_of(tmp_path / "a0") == config_of(plain)
    content = json.loads((tmp_path / "a0" / "adapter_merge.json").read_text("utf-8"))
    assert content["adapters"][0]["trained_on"] == "nf4-double, as stated"
    assert content["adapters"][0]["stated"] == {"trained_on": "nf4-double"}


@pytest.mark.slow
def test_verify_and_factors_take_the_same_statement(
    work: tuple[Path, Path, dict[str, Tensor]], make: Callable[..., Path], tmp_path: Path
) -> None:
    _, plain, _ = work
    dora = make(use_dora=True)
    merge(plain, dora, tmp_path / "out", MergeOptions(reading=NF4))
    assert verify(plain, dora, tmp_path / "out", VerifyOptions(reading=NF4, generated=2)).passed
    assert not verify(plain, dora, tmp_path / "out", VerifyOptions(weights_only=True)).passed
    factor(plain, dora, tmp_path / "factors", FactorOptions(reading=NF4))
    result = factor(plain, dora, tmp_path / "low", FactorOptions(reading=NF4, rank=8, end_to_end=True))
    assert result.as_json()["certificate"]["end_to_end"]["effect"] > 0


def test_a_name_of_a_4bit_base_is_shown_and_warned_about(
    work: tuple[Path, Path, dict[str, Tensor]], make: Callable[..., Path], tmp_path: Path
) -> None:
    stored, plain, _ = work
    lora = make()
    config = json.loads((lora / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = "unsloth/pico-llama-bnb-4bit"
    (lora / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert "pico-llama-bnb-4bit" in inspect(lora).as_json()["trained_on"]
    assert "nf4" in inspect(lora, stored).as_json()["trained_on"]
    stated = InspectOptions(reading=ReadOptions(trained_on="nf4"))
    assert inspect(lora, plain, stated).as_json()["trained_on"] == "nf4, as stated"
    result = merge(plain, lora, tmp_path / "one", MergeOptions())
    assert any("--trained-on" in text for text in result.warnings)
    result = merge(plain, lora, tmp_path / "two", MergeOptions(reading=ReadOptions(trained_on="original")))
    assert not any("--trained-on" in text for text in result.warnings)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError, match="unquantised base"):
        merge(stored, lora, tmp_path / "no", MergeOptions(write_as="bfloat16", reading=NF4))


@pytest.mark.parametrize("use_dora", [False, True], ids=["pissa", "dude"])
def test_a_residual_is_not_cut_out_of_a_quantised_weight(
    use_dora: bool, work: tuple[Path, Path, dict[str, Tensor]], make: Callable[..., Path], tmp_path: Path
) -> None:
    """QPiSSA quantises the residual: with the residual base it is merged, with the original one it is refused."""
    stored, plain, _ = work
    adapter = make(init_lora_weights="pissa", use_dora=use_dora)
    for base, options in (
        (stored, MergeOptions(write_as="bfloat16", base_kind="original")),
        (plain, MergeOptions(reading=NF4, base_kind="original")),
    ):
        with pytest.raises(UnsupportedError, match="residual"):
            merge(base, adapter, tmp_path / "no", options)
    merge(plain, adapter, tmp_path / "out", MergeOptions(reading=replace(NF4, force=True), base_kind="residual"))
    saved = load_file(adapter / "adapter_model.safetensors")
    found, dense = tensors_of(tmp_path / "out"), work[2]
    name = "model.layers.0.self_attn.q_proj"
    key = f"base_model.model.{name}.lora_"
    wanted = dense[f"{name}.weight"].double() + 2 * saved[f"{key}B.weight"].double() @ saved[f"{key}A.weight"].double()
    if use_dora:
        magnitude = saved[f"{key}magnitude_vector"].double()
        wanted *= (magnitude / torch.linalg.vector_norm(wanted, dim=1))[:, None]
    error = (found[f"{name}.weight"].double() - wanted).abs() - (wanted.bfloat16().double() - wanted).abs()
    assert float(error.max()) <= 1e-6 * float(wanted.abs().max())
