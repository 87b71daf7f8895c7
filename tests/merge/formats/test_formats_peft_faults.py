"""Folders that PEFT has damaged, and folders that nobody should merge: what is lost is noticed, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_cases import SOME, TOLERANCE, bases, converted_dude, merged_logits
from pico_bases import (
    error,
    load,
    logits,
    quiet,
    randomise,
    train,
)
from safetensors.torch import load_file, save_file

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.errors import AdapterError, MismatchError, UnsupportedError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory)


# -- PEFT's faults --------------------------------------------------------------------------------------


def test_missing_magnitudes_are_refused_and_can_be_given(base: Callable[[str], Path], tmp_path: Path) -> None:
    expected = converted_dude(base("llama"), tmp_path)
    assert not any("magnitude" in key for key in load_file(tmp_path / "converted" / "adapter_model.safetensors"))
    with pytest.raises(AdapterError, match="--magnitudes"):
        merge(base("llama"), tmp_path / "converted", tmp_path / "no", MergeOptions(device="cpu"))
    assert not (tmp_path / "no").exists()
    for source in (tmp_path / "kept", tmp_path / "kept" / "adapter_model.safetensors"):
        options = ReadOptions(magnitudes=source)
        out = tmp_path / f"out-{source.name}"
        got = merged_logits(base("llama"), tmp_path / "converted", out, reading=options)
        assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("rank", [4, 0.9])
@pytest.mark.parametrize("arguments", [{"use_dora": True}, {"use_dora": True, "init_lora_weights": "pissa"}, {}])
def test_what_save_as_lora_left_is_noted(
    arguments: dict[str, Any], rank: float, base: Callable[[str], Path], tmp_path: Path
) -> None:
    """It drops a DoRA's magnitudes: the folder looks like one made of a LoHa, but not like one that was trained."""
    from adapter_merge.api.inspect import inspect

    live = train(base("llama"), peft.LoraConfig(r=4, target_modules=SOME, **arguments), tmp_path / "a")
    with quiet():
        peft.save_as_lora(tmp_path / "c", live, rank=rank)
    expected = logits(live)
    got = merged_logits(base("llama"), tmp_path / "c", tmp_path / "out")
    lost = error(got, expected)
    assert lost > 0.05 if arguments else rank == 0.9 or lost < 2e-4
    manifest = json.loads((tmp_path / "out" / "adapter_merge.json").read_text())
    for notes in (inspect(tmp_path / "c").as_json()["notes"], manifest["adapters"][0]["notes"]):
        assert len(notes) == 1 and "save_as_lora" in notes[0] and "use the original folder" in notes[0]
    assert inspect(tmp_path / "a").as_json()["notes"] == []
    live.save_pretrained(tmp_path / "again")
    assert inspect(tmp_path / "again").as_json()["notes"] == []


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
@pytest.mark.parametrize("dora", [False, True])
def test_lost_initialisations_need_the_initial_adapter_or_the_residual(
    init: str, dora: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=SOME, init_lora_weights="pissa_niter_4", use_dora=dora)
    with quiet():
        model = peft.get_peft_model(load(base("llama")), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        with model.disable_adapter():
            residual = {
                key.removeprefix("base_model.model.").replace(".base_layer.", "."): value.clone()
                for key, value in model.state_dict().items()
                if ".lora_" not in key
            }
        randomise(model, 0.03)
        model.eval()
        model.peft_config["default"].init_lora_weights = init
        model.save_pretrained(tmp_path / "a")
        expected = logits(model)
    with pytest.raises(UnsupportedError, match="--init-adapter"):
        merge(base("llama"), tmp_path / "a", tmp_path / "no", MergeOptions(device="cpu"))
    options = ReadOptions(init_adapter=tmp_path / "initial")
    got = merged_logits(base("llama"), tmp_path / "a", tmp_path / "out", reading=options)
    assert error(got, expected) < TOLERANCE
    import shutil

    shutil.copytree(base("llama"), tmp_path / "residual")
    save_file(residual, tmp_path / "residual" / "model.safetensors", {"format": "pt"})
    got = merged_logits(tmp_path / "residual", tmp_path / "a", tmp_path / "out2", base_kind="residual")
    assert error(got, expected) < TOLERANCE
    if init.startswith("pissa"):  # the evidence tells the residual by itself
        assert error(merged_logits(tmp_path / "residual", tmp_path / "a", tmp_path / "out3"), expected) < TOLERANCE


# -- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"(q|q)*_proj": 4}},
        {"rank_pattern": {r"(.)\1\1\1q_proj": 4}},
        {"rank_pattern": {".*.*.*.*.*.*q": 4}},
        {"rank_pattern": {"[": 4}},
        {"rank_pattern": {"q_proj": -1}},
        {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": [4]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"alpha_pattern": "q_proj"},
        {"r": None},
        {"r": True},
        {"r": 4.5},
        {"r": 10**30},
        {"lora_alpha": "32"},
        {"lora_alpha": None},
        {"lora_alpha": float("inf")},
        {"use_rslora": "yes"},
        {"use_dora": 1},
        {"fan_in_fan_out": "no"},
        {"target_parameters": "mlp.experts"},
        {"target_parameters": [[]]},
        {"init_lora_weights": {"pissa": 1}},
        {"init_lora_weights": "unheard_of"},
        {"layer_replication": [[0, 2]]},
        {"kasa_config": {"beta": 1}},
        {"peft_type": "OFT"},
        {"peft_type": None},
        {"peft_type": ["LORA"]},
    ],
    ids=repr,
)
def test_strange_configs_get_clear_errors(change: dict[str, Any], base: Callable[[str], Path], tmp_path: Path) -> None:
    train(base("llama"), peft.LoraConfig(r=4, target_modules=SOME), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((AdapterError, UnsupportedError)):
        merge(base("llama"), tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert not (tmp_path / "out").exists()


def test_dora_with_trained_lora_bias_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    train(base("biased"), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    biases = {
        key.replace("lora_B.weight", "lora_B.bias"): t[:, 0].clone() for key, t in tensors.items() if "lora_B" in key
    }
    save_file(tensors | biases, file, {"format": "pt"})
    with pytest.raises(AdapterError, match="without DoRA"):
        open_adapter(tmp_path / "a")


def test_lora_bias_on_a_layer_without_bias_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    train(base("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), tmp_path / "a")
    with pytest.raises(MismatchError, match="no bias"):
        merge(base("llama"), tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))


def test_token_beyond_the_embedding_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    train(base("llama"), peft.LoraConfig(r=4, target_modules=SOME, trainable_token_indices=[1, 2]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    for indices, kind in (([1, 64], MismatchError), ([1, 1], AdapterError), ([1], AdapterError), ("x", AdapterError)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": indices}))
        with pytest.raises(kind):
            merge(base("llama"), tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
