"""Merging into quantised bases: the library's own dequantised weight plus the float64 delta, rounded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from pico_bases import quiet, train
from quantised_bases import KINDS, config_of, quantised
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.errors import AdapterMergeError, FileFormatError, InputError

TARGETS = ["q_proj", "gate_proj", "down_proj"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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
def lora(bases: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4, made by PEFT on the unquantised model."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    plain = bases("nf4")[0].with_name("nf4-plain")
    train(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def exact(dense: dict[str, Tensor], lora: Path) -> dict[str, Tensor]:
    """W + 2 B A in float64 of each adapted weight."""
    factors = load_file(lora / "adapter_model.safetensors")
    after = {}
    for key, a in factors.items():
        if key.endswith("lora_A.weight"):
            b = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            after[name] = dense[name].double() + 2 * b.double() @ a.double()
    return after


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "bfloat16") for kind in KINDS), ("nf4", "float32")])
def test_merged_weights_are_the_librarys_plus_delta_rounded_once(
    kind: str, dtype: str, bases: Callable[[str], Base], lora: Path, tmp_path: Path
) -> None:
    base, dense = bases(kind)
    merge(base, lora, tmp_path / "out", MergeOptions(write_as=dtype))
    found, adapted, wanted = tensors_of(tmp_path / "out"), exact(dense, lora), DTYPES[dtype]
    assert set(found) == set(dense)
    assert len(adapted) == 2 * len(TARGETS)
    quantised_names = {name for name, value in dense.items() if value.dim() == 2} - {"lm_head.weight"}
    for name, value in found.items():
        if name in adapted:
            # float32 sums are off by their last bits: beside a tie the other neighbour may come out
            off = (value.double() - adapted[name]).abs() - (adapted[name].to(wanted).double() - adapted[name]).abs()
            assert float(off.max()) <= 1e-6 * float(adapted[name].abs().max()), name
            assert float((value != adapted[name].to(wanted)).float().mean()) < 1e-3 or dtype == "float32", name
        elif name in quantised_names and "embed" not in name:
            assert torch.equal(value, dense[name].to(wanted)), name
        else:
            assert torch.equal(value, dense[name]), name
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config["dtype"] == dtype
    with quiet():
        model, report = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True, dtype="auto"
        )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.dtype == (torch.bfloat16 if dtype == "bfloat16" else model.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_passes_and_sees_a_changed_weight(
    kind: str, bases: Callable[[str], Base], lora: Path, tmp_path: Path
) -> None:
    base, _ = bases(kind)
    merge(base, lora, tmp_path / "out", MergeOptions(write_as="bfloat16"))
    assert verify(base, lora, tmp_path / "out", VerifyOptions(weights_only=True)).passed
    file = next(
        file for file in (tmp_path / "out").glob("*.safetensors") if any("o_proj" in key for key in load_file(file))
    )
    spoilt = load_file(file)
    name = next(key for key in spoilt if "o_proj" in key)  # not adapted, and packed in the base
    spoilt[name][3, 5] *= 1.5
    save_file(spoilt, file, {"format": "pt"})
    report = verify(base, lora, tmp_path / "out", VerifyOptions(weights_only=True))
    assert [problem for problem in report.problems if name in problem]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_layers_equal_pefts_live_layers_on_bitsandbytes(use_dora: bool, tmp_path: Path) -> None:
    """DoRA's row norms are those of the dequantised weight. In float32, which bitsandbytes then computes in as well.

    As in training: in evaluation, bitsandbytes 0.50 takes a bfloat16 kernel on some CPUs, and packs its weight anew at
    the first call, which its dequantize_4bit (and with it PEFT's DoRA) does not know.
    """
    base, _ = quantised("nf4", tmp_path / "nf4", dtype=torch.float32)
    with quiet():
        live = transformers.LlamaForCausalLM.from_pretrained(base, device_map="cpu")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=use_dora, lora_dropout=0.0)
        model = peft.get_peft_model(live, config).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    value.normal_(0, 0.05, generator=generator)
                elif "magnitude" in name:
                    value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
        model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", MergeOptions(write_as="float32"))
    found = tensors_of(tmp_path / "out")
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and name}
    assert len(layers) == 2 * len(TARGETS)
    for name, layer in layers.items():
        x = torch.randn(7, layer.in_features, generator=generator).requires_grad_()
        with quiet():
            expected, plain = layer(x).detach(), layer.base_layer(x).detach()
        got = x.detach() @ found[f"{name.removeprefix('base_model.model.')}.weight"].T
        assert float((expected - plain).abs().max()) > 0.1
        assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max()), name


@pytest.mark.slow
def test_deltas_and_factors_of_a_quantised_base(bases: Callable[[str], Base], tmp_path: Path) -> None:
    """Deltas against float64, and exact and truncated factors by verify, which loads the dequantised base."""
    base, dense = bases("FP8_BLOCK")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True)
    train(bases("nf4")[0].with_name("nf4-plain"), config, tmp_path / "adapter")
    delta(base, tmp_path / "adapter", tmp_path / "delta")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = exact(dense, tmp_path / "adapter")
    deltas = load_file(tmp_path / "delta" / "delta.safetensors")
    assert deltas.keys() == after.keys()
    for name, value in deltas.items():
        magnitude = saved[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"].double()
        wanted = after[name] * (magnitude / torch.linalg.vector_norm(after[name], dim=1))[:, None]
        wanted = wanted - dense[name].double()
        error = torch.linalg.vector_norm(value.double() - wanted) / torch.linalg.vector_norm(wanted)
        assert float(error) < 1e-6, name
    factor(base, tmp_path / "adapter", tmp_path / "factors")
    result = factor(base, tmp_path / "adapter", tmp_path / "few", FactorOptions(rank=2, end_to_end=True))
    assert result.as_json()["certificate"]["end_to_end"]["max_dlogit"] > 0
    for made in ("delta", "factors"):
        report = verify(base, tmp_path / "adapter", tmp_path / made, VerifyOptions(generated=2))
        assert report.passed, report.problems


def test_adapters_are_combined_on_a_quantised_base(bases: Callable[[str], Base], lora: Path, tmp_path: Path) -> None:
    base, dense = bases("W4A16")
    other = tmp_path / "other"
    train(bases("nf4")[0].with_name("nf4-plain"), peft.LoraConfig(r=2, target_modules=["q_proj"]), other, seed=5)
    recipe = make_recipe([Ingredient("a", str(lora), 0.5), Ingredient("b", str(other), 2.0)], Settings())
    merge(base, recipe, tmp_path / "out", MergeOptions(write_as="float32"))
    factors = load_file(other / "adapter_model.safetensors")
    found, one = tensors_of(tmp_path / "out"), exact(dense, lora)
    for name in one:
        wanted = dense[name].double() + 0.5 * (one[name] - dense[name].double())
        if "q_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            wanted += 2.0 * (8 / 2) * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
        assert float((found[name].double() - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max()), name
    assert verify(base, recipe, tmp_path / "out", VerifyOptions(weights_only=True)).passed


def test_a_trained_head_replaces_a_packed_or_plain_one(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base, dense = bases("nf4")
    plain = base.with_name("nf4-plain")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"])
    train(plain, config, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", MergeOptions(write_as="bfloat16"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = tensors_of(tmp_path / "out")
    for key, value in saved.items():
        name = key.removeprefix("base_model.model.")
        if name in dense and ("up_proj" in name or "lm_head" in name):
            assert torch.equal(found[name], value.to(torch.bfloat16)), name
    assert verify(base, tmp_path / "adapter", tmp_path / "out", VerifyOptions(weights_only=True)).passed


def test_the_choice_is_the_users(bases: Callable[[str], Base], lora: Path, tmp_path: Path) -> None:
    base, _ = bases("W4A16")
    with pytest.raises(InputError, match=r"quantised.*state how to write") as raised:
        merge(base, lora, tmp_path / "out")
    assert "pack-quantized" in str(raised.value.problems[0].got)
    with pytest.raises(InputError, match="contradict"):
        merge(base, lora, tmp_path / "out", MergeOptions(write_as="bfloat16", dtype="float32"))
    with pytest.raises(InputError, match="pre-image"):
        merge(base, lora, tmp_path / "out", MergeOptions(write_as="bfloat16", keep_preimage=True))
    with pytest.raises(InputError, match="is for a quantised base"):
        merge(bases("nf4")[0].with_name("nf4-plain"), lora, tmp_path / "out", MergeOptions(write_as="bfloat16"))
    assert not (tmp_path / "out").exists()


def test_every_file_of_the_base_is_hashed_and_described(
    bases: Callable[[str], Base], lora: Path, tmp_path: Path
) -> None:
    base, _ = bases("FP8_BLOCK")
    content = merge(base, lora, tmp_path / "out", MergeOptions(write_as="bfloat16")).as_json()
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir()}
    assert content["base"]["files"].items() >= {name: sha for name, sha in files.items() if name != "README.md"}.items()
    assert content["base"]["quantised"] == {next(iter(content["base"]["quantised"])): 14}
    assert content["options"]["as"] == "bfloat16"


def test_a_killed_merge_goes_on(bases: Callable[[str], Base], lora: Path, tmp_path: Path) -> None:
    """Finished shards of a failed run are taken over, and a changed file of scales makes them again."""
    base, _ = bases("FP8_DYNAMIC")
    options = MergeOptions(write_as="bfloat16", keep_partial=True, part=(1, 2))
    merge(base, lora, tmp_path / "out", options)
    merge(base, lora, tmp_path / "out", MergeOptions(write_as="bfloat16", keep_partial=True, part=(2, 2)))
    merge(base, lora, tmp_path / "out", MergeOptions(write_as="bfloat16", finish=True))
    merge(base, lora, tmp_path / "whole", MergeOptions(write_as="bfloat16"))
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_missing_scales_are_named(bases: Callable[[str], Base], lora: Path, tmp_path: Path) -> None:
    base, _ = bases("FP8_DYNAMIC")
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = tensors_of(base)
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text(json.dumps(config_of(base)), "utf-8")
    with pytest.raises(AdapterMergeError, match=r"layers\.1\.mlp\.down_proj") as raised:
        merge(broken, lora, tmp_path / "out", MergeOptions(write_as="bfloat16"))
    assert isinstance(raised.value, FileFormatError)
