"""verify: right artefacts pass with a model of which one layer is in memory at a time; wrong ones fail by verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_families import mixture
from peft_cases import CASES, SOME, bases
from pico_bases import load, quiet, randomise
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.verification import streamed_model

LIVE = [
    "saved embedding, tied",
    "saved embedding and head, tied",
    "tokens",
    "tokens, tied",
    "PiSSA",
    "Conv1D DuDe",
    "VeRA from its seed",
    "experts, apart on disk",
    "experts, patterns",
    "experts of gpt-oss",
    "square experts of gpt-oss",
    "experts of Llama 4",
    "square experts of Llama 4",
    "a bare 2-D parameter",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return bases(tmp_path_factory)


def trained(base: Path, folder: Path, kind: str = "LoraConfig", **settings: Any) -> Path:
    with quiet():
        model = peft.get_peft_model(load(base), getattr(peft, kind)(**settings))
        randomise(model)
        model.save_pretrained(folder)
    return folder


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("case", LIVE)
def test_a_right_merge_passes_one_layer_at_a_time(
    case: str, base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_model, "KEPT_BYTES", 0)
    monkeypatch.setattr(streamed_model, "LARGE_LEAF", 1000)
    name, kind, settings = CASES[case]
    adapter = trained(base(name), tmp_path / "adapter", kind, **settings)
    merge(base(name), adapter, tmp_path / "merged", MergeOptions(device="cpu"))
    report = verify(base(name), adapter, tmp_path / "merged", VerifyOptions(generated=4)).as_json()
    assert report["passed"], report["problems"]
    assert report["logits"]["effect"] > 100 * report["logits"]["max_difference"]


def test_a_given_residual_dtype_is_that_of_the_live_model(base: Callable[[str], Path], tmp_path: Path) -> None:
    from pico_bases import llama

    from adapter_merge.formats.stated_settings import ReadOptions

    with quiet():
        half = llama(tmp_path / "half", dtype=torch.bfloat16)
        model = load(half).float()
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=SOME, init_lora_weights="pissa"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(1.1)
        model.save_pretrained(tmp_path / "adapter")
    options = ReadOptions(residual_dtype="float32")
    merge(half, tmp_path / "adapter", tmp_path / "merged", MergeOptions(reading=options, device="cpu", dtype="float32"))
    report = verify(
        half, tmp_path / "adapter", tmp_path / "merged", VerifyOptions(reading=options, generated=4)
    ).as_json()
    assert report["passed"], report["problems"]
    wrong = VerifyOptions(reading=ReadOptions(residual_dtype="bfloat16"), generated=4)
    assert not verify(half, tmp_path / "adapter", tmp_path / "merged", wrong).as_json()["passed"]


def test_a_converted_adapter_of_zeros_fails(base: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = trained(base("llama"), tmp_path / "adapter", r=4, target_modules=SOME, use_dora=True)
    convert(adapter, tmp_path / "converted")
    assert verify(base("llama"), adapter, tmp_path / "converted", VerifyOptions(weights_only=True)).as_json()["passed"]
    file = tmp_path / "converted" / "adapter_model.safetensors"
    edit(file, lambda tensors: [tensor.zero_() for tensor in tensors.values()])  # type: ignore[arg-type, func-returns-value]
    report = verify(base("llama"), adapter, tmp_path / "converted", VerifyOptions(weights_only=True)).as_json()
    assert not report["passed"] and len(report["layers"]) == 6


def test_truncated_factors_are_compared_with_the_optimum_of_their_rank(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = trained(base("llama"), tmp_path / "adapter", r=4, target_modules=SOME)
    factor(base("llama"), adapter, tmp_path / "factors", FactorOptions(rank=2))
    report = verify(base("llama"), adapter, tmp_path / "factors", VerifyOptions(weights_only=True)).as_json()
    assert report["passed"], report["problems"]
    assert min(layer["relative_error"] for layer in report["layers"].values()) > 0.01
    for scale in (100.0, 0.9):
        shutil.copytree(tmp_path / "factors", tmp_path / f"scaled {scale}")
        edit(
            tmp_path / f"scaled {scale}" / "adapter_model.safetensors",
            lambda tensors: [tensor.mul_(scale) for name, tensor in tensors.items() if "lora_B" in name],  # type: ignore[arg-type, func-returns-value] # noqa: B023
        )
        assert not verify(
            base("llama"), adapter, tmp_path / f"scaled {scale}", VerifyOptions(weights_only=True)
        ).as_json()["passed"]


@pytest.mark.parametrize("what", ["config", "tensor", "missing", "shape"])
def test_other_changes_of_a_merged_model_fail_by_verdict(
    what: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = trained(base("llama"), tmp_path / "adapter", r=4, target_modules=SOME)
    merged = tmp_path / "merged"
    merge(base("llama"), adapter, merged, MergeOptions(device="cpu"))
    name = "model.layers.1.self_attn.q_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if what == "tensor":
            tensors["model.layers.7.mlp.added.weight"] = torch.ones(2, 2)
        elif what == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:16].contiguous()

    if what == "config":
        config = json.loads((merged / "config.json").read_text())
        config["rms_norm_eps"] = 0.1
        (merged / "config.json").write_text(json.dumps(config))
    else:
        edit(merged / "model.safetensors", change)
    report = verify(base("llama"), adapter, merged, VerifyOptions(weights_only=True)).as_json()
    assert not report["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "jamba", "qwen3_moe"])
def test_a_mixture_of_experts_is_compared_in_float64(name: str, tmp_path: Path) -> None:
    """torch's grouped product of experts takes no float64: verify asks for it where float32 noise is too large."""
    base = mixture(name, tmp_path / "base")
    model = load(base)
    with quiet():
        live = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
        randomise(live)
        live.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", MergeOptions(device="cpu"))
    report = verify(base, tmp_path / "adapter", tmp_path / "out", VerifyOptions(tolerance=1e-12, generated=2)).as_json()
    assert report["logits_float64"]["max_difference"] < 1e-6 < report["logits_float64"]["effect"]
    assert report["problems"] == [f"max |dlogit| {report['logits_float64']['max_difference']:.3g} is above 1e-12"]
