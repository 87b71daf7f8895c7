"""Merging into a quantised base in its own scheme: other bytes in adapted weights alone, and a measured retention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from pico_bases import quiet, train
from quantised_bases import KINDS, config_of, quantised
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, RestoreOptions, VerifyOptions
from adapter_merge.api.restore import restore
from adapter_merge.api.verify import verify
from adapter_merge.errors import InputError, ParityError
from adapter_merge.quantisation.dense_view import open_base, packed_weights
from adapter_merge.storage.tensor_io import read_bytes, read_tensor

TARGETS = ["q_proj", "down_proj"]
SAME = MergeOptions(write_as="same")
Base = tuple[Path, dict[str, Tensor]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def make(kind: str) -> Base:
        if kind not in made:
            made[kind] = quantised(kind, tmp_path_factory.mktemp("base") / kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def loras(bases: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """LoRAs of a given size of the change: 0.1 is above the steps of 4-bit grids, 0.01 below, 0.0003 far below."""
    made: dict[float, Path] = {}

    def make(scale: float) -> Path:
        if scale not in made:
            made[scale] = tmp_path_factory.mktemp("lora") / "lora"
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
            train(bases("nf4")[0].with_name("nf4-plain"), config, made[scale], scale=scale)
        return made[scale]

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def library_weights(folder: Path, kind: str) -> dict[str, Tensor]:
    """The weights of the model that transformers loads with its own quantiser, as the scheme's library dequantises."""
    import bitsandbytes as bnb

    with quiet():
        model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
        if kind != "nf4":  # whose first forward packs the weights for the CPU
            model(torch.arange(8)[None])  # compressed-tensors dequantises in it
    weights = {}
    for name, value in model.named_parameters():
        state = getattr(value, "quant_state", None)
        weights[name] = value.data if state is None else bnb.functional.dequantize_4bit(value.data, state)
    return weights


def delta_of(lora: Path, name: str) -> Tensor:
    factors = load_file(lora / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    return 2 * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapted_weights_change_and_the_library_loads_them(
    kind: str, bases: Callable[[str], Base], loras: Callable[[float], Path], tmp_path: Path
) -> None:
    base, dense = bases(kind)
    content = merge(base, loras(0.1), tmp_path / "out", SAME).as_json()
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].view(torch.uint8).ne(after[name].view(torch.uint8)).any()}
    assert changed
    assert all(any(f".{target}." in name for target in TARGETS) for name in changed)
    assert config_of(tmp_path / "out") == config_of(base)
    weights = library_weights(tmp_path / "out", kind)
    total = kept = 0.0
    for name, figures in content["layers"].items():
        delta = delta_of(loras(0.1), name)
        moved = weights[name].double() - dense[name].double()
        retention = float((moved * delta).sum() / delta.square().sum())
        assert figures["retention"] == pytest.approx(retention, rel=1e-4), name
        error = float(torch.linalg.vector_norm(moved - delta) / torch.linalg.vector_norm(delta))
        assert figures["rounding"] == pytest.approx(error, rel=1e-3), name
        total, kept = total + float(delta.square().sum()), kept + float((moved * delta).sum())
    assert content["certificate"]["retention"] == pytest.approx(kept / total, rel=1e-4)
    assert content["certificate"]["retention"] > 0.9
    assert len(content["layers"]) == 2 * len(TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_sees_one_changed_code(
    kind: str, bases: Callable[[str], Base], loras: Callable[[float], Path], tmp_path: Path
) -> None:
    base, _ = bases(kind)
    merge(base, loras(0.1), tmp_path / "out", SAME)
    only = VerifyOptions(weights_only=True)
    assert verify(base, loras(0.1), tmp_path / "out", only).passed
    for target in ("q_proj", "o_proj"):  # adapted, and carried
        name, file = next(
            (name, file)
            for file in sorted((tmp_path / "out").glob("*.safetensors"))
            for name in load_file(file)
            if target in name and name.endswith(("weight", "weight_packed"))
        )
        right = file.read_bytes()
        spoilt = load_file(file)
        spoilt[name].view(torch.uint8).view(-1)[77] ^= 0x11  # both nibbles of a byte
        save_file(spoilt, file, {"format": "pt"})
        report = verify(base, loras(0.1), tmp_path / "out", only)
        assert any(name.removesuffix("_packed") in problem for problem in report.problems), target
        file.write_bytes(right)
    assert verify(base, loras(0.1), tmp_path / "out", only).passed


@pytest.mark.parametrize("factor", [0.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_verify_sees_wrong_scales_with_the_right_codes(
    kind: str, factor: float, bases: Callable[[str], Base], loras: Callable[[float], Path], tmp_path: Path
) -> None:
    """For scales of zero every code is the nearest one; coarser scales with their nearest codes lose what they can."""
    base, _ = bases(kind)
    merge(base, loras(0.1), tmp_path / "out", SAME)
    merged = open_base(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = packed_weights(merged)[name]
    dense = read_tensor(merged.tensors[name]).float()
    role = "nested_absmax" if kind == "nf4" else "scale"
    (file,) = {weight.parts[role].file}
    spoilt = load_file(file)
    scale = spoilt[weight.parts[role].name]
    scale.copy_((scale.float() * factor).to(scale.dtype))
    save_file(spoilt, file, {"format": "pt"})
    if factor:
        after = packed_weights(open_base(tmp_path / "out"))[name]
        codes = next(iter(after.candidates(dense, read_bytes)))
        for part, value in codes.items():
            written = load_file(after.parts[part].file)
            written[after.parts[part].name] = value.reshape(written[after.parts[part].name].shape).contiguous()
            save_file(written, after.parts[part].file, {"format": "pt"})
    report = verify(base, loras(0.1), tmp_path / "out", VerifyOptions(weights_only=True))
    assert any(name in problem for problem in report.problems), report.problems


@pytest.mark.parametrize("kind", ["nf4", "W4A16"])
def test_a_change_below_the_grid_is_kept(
    kind: str, bases: Callable[[str], Base], loras: Callable[[float], Path], tmp_path: Path
) -> None:
    """Nearest codes of a 4-bit grid keep next to nothing; drawn codes keep the mean, and verify knows them."""
    base, dense = bases(kind)
    content = merge(base, loras(0.01), tmp_path / "out", SAME).as_json()
    weights = library_weights(tmp_path / "out", kind)
    total = kept = 0.0
    for name in content["layers"]:
        delta = delta_of(loras(0.01), name)
        total += float(delta.square().sum())
        kept += float(((weights[name].double() - dense[name].double()) * delta).sum())
    assert kept / total == pytest.approx(1, abs=0.3)  # of 9,000 elements, whose noise is several times the change
    only = VerifyOptions(weights_only=True)
    report = verify(base, loras(0.01), tmp_path / "out", only)
    assert report.passed, report.problems
    name, file = next(
        (name, file)
        for file in sorted((tmp_path / "out").glob("*.safetensors"))
        for name in load_file(file)
        if "q_proj" in name and name.endswith(("weight", "weight_packed"))
    )
    spoilt = load_file(file)
    spoilt[name].view(torch.uint8).view(-1)[77] ^= 0x01  # a neighbour, and not the one that was drawn
    save_file(spoilt, file, {"format": "pt"})
    report = verify(base, loras(0.01), tmp_path / "out", only)
    assert any("that the exact ones round to" in problem for problem in report.problems)


@pytest.mark.parametrize("kind", ["nf4", "W4A16"])
def test_a_change_far_below_the_grid_is_refused(
    kind: str, bases: Callable[[str], Base], loras: Callable[[float], Path], tmp_path: Path
) -> None:
    base, _ = bases(kind)
    with pytest.raises(ParityError, match="quantised again") as raised:
        merge(base, loras(0.0003), tmp_path / "out", SAME)
    assert "bfloat16" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    merge(base, loras(0.0003), tmp_path / "out", MergeOptions(write_as="same", min_retention=0.0))
    report = verify(base, loras(0.0003), tmp_path / "out", VerifyOptions(weights_only=True))
    assert [problem for problem in report.problems if "retain" in problem]
    with pytest.raises(InputError, match="contradict"):
        merge(base, loras(0.1), tmp_path / "no", MergeOptions(write_as="same", dtype="bfloat16"))


def test_the_base_is_restored_from_what_was_overwritten(
    bases: Callable[[str], Base], loras: Callable[[float], Path], tmp_path: Path
) -> None:
    base, _ = bases("FP8_BLOCK")
    merge(base, loras(0.1), tmp_path / "out", MergeOptions(write_as="same", keep_preimage=True))
    restore(tmp_path / "out", tmp_path / "back", RestoreOptions())
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_dora_and_a_trained_module_are_quantised_again(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base, _ = bases("FP8_DYNAMIC")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["up_proj"])
    train(bases("nf4")[0].with_name("nf4-plain"), config, tmp_path / "adapter")
    content = merge(base, tmp_path / "adapter", tmp_path / "out", SAME).as_json()
    assert sum("up_proj" in name for name in content["layers"]) == 2
    assert sum("q_proj" in name for name in content["layers"]) == 2
    assert content["certificate"]["retention"] > 0.9
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights = library_weights(tmp_path / "out", "FP8_DYNAMIC")
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = saved[f"base_model.model.{name}"].double()
    error = torch.linalg.vector_norm(weights[name].double() - wanted) / torch.linalg.vector_norm(wanted)
    assert float(error) < 0.04  # half a step of E4M3
    assert verify(base, tmp_path / "adapter", tmp_path / "out", VerifyOptions(weights_only=True)).passed
