"""verify on quantised bases: models run from the weights as transformers' own quantiser gives them on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_bases
import peft
import pico_bases
import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from pico_bases import train
from quantised_bases import OTHER_PRESETS, PRESETS, config_of, llama, quantised
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.binding.trained_base import open_trained_base
from adapter_merge.quantisation.dense_view import open_base, packed_weights
from adapter_merge.verification import own_quantiser
from adapter_merge.verification.streamed_adapter import held_model, streamed_base

LOADED = ("nf4", "int8", *PRESETS, *OTHER_PRESETS)  # by transformers, on a CPU
READ_HERE = ("gptq", "awq")
Base = tuple[Path, dict[str, Tensor]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def make(kind: str) -> Base:
        if kind not in made:
            folder = tmp_path_factory.mktemp("base") / kind
            if kind == "gpt-oss":
                made[kind] = packed_bases.gpt_oss_base(folder)
            elif kind in READ_HERE:
                made[kind] = packed_bases.packed_base(kind, folder, 128)
            else:
                made[kind] = quantised(kind, folder, 256 if kind == "FP8_BLOCK" else 128)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    place, made = tmp_path_factory.mktemp("lora"), dict[int, Path]()

    def make(hidden: int) -> Path:
        if hidden not in made:
            llama(hidden).save_pretrained(place / f"plain-{hidden}")
            made[hidden] = place / f"adapter-{hidden}"
            train(place / f"plain-{hidden}", peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), made[hidden])
        return made[hidden]

    return make


def spoil_readers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every reader of the base's weights wrong by 1 %."""
    for kind in {type(weight) for weight in packed_weights(open_base(base)).values()}:
        read = kind.rows
        monkeypatch.setattr(kind, "rows", lambda *inputs, read=read: read(*inputs) * 1.01)


def rewrite(base: Path, folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """Write a base with other tensors, and with other keys in its quantization_config."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = config_of(base)
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def experts_base(folder: Path, scheme: str) -> Path:
    """A Mixtral whose experts are FP8, in blocks of 8 x 8 (packed by transformers) or in rows."""
    plain = pico_bases.mixtral(folder / "plain")
    blocks = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(weight_block_size=(8, 8)), pre_quantized=False)
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_of(plain).items():
        if ".experts." not in name:
            tensors[name] = value.bfloat16()
        elif scheme == "blocks":
            tensors |= Fp8Quantize(blocks).convert({name: value})
        else:
            scale = value.abs().amax(1, keepdim=True) / 448
            tensors |= {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.bfloat16()}
    settings: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    if scheme == "rows":
        group = json.loads(preset_name_to_scheme("FP8_DYNAMIC", ["re:.*experts.*"]).model_dump_json())
        settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                    "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
    config = config_of(plain) | {"quantization_config": {}}
    (plain / "config.json").write_text(json.dumps(config), "utf-8")
    return rewrite(plain, folder / scheme, tensors, **settings)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("kind", [*LOADED, "gpt-oss"])
def test_models_hold_the_weights_that_transformers_dequantises(
    kind: str, bases: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, dense = bases(kind)
    view = open_base(base)
    spoil_readers(base, monkeypatch)
    for dtype in (torch.float32, torch.float64):
        state = held_model(streamed_base(view, dtype)).state_dict()
        assert state.keys() == dense.keys()
        for name, value in state.items():
            assert torch.equal(value, dense[name].to(dtype)), name
    assert "as transformers" in own_quantiser.quantiser_note(view)


def test_experts_that_are_stored_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers stacks them; of compressed-tensors' FP8 it leaves out the rounding to the scale's dtype."""
    folder = experts_base(tmp_path / "a", "blocks")
    tensors = tensors_of(folder)
    dense: dict[str, list[Tensor]] = {}
    for name, value in tensors.items():
        if name.endswith(("w1.weight", "w2.weight", "w3.weight")):
            grid = tensors[f"{name}_scale_inv"].repeat_interleave(8, 0).repeat_interleave(8, 1)
            dense.setdefault(name.rpartition("experts.")[0] + name.split(".")[-2], []).append(value.float() * grid)
    view = open_base(folder)
    spoil_readers(folder, monkeypatch)
    state = held_model(streamed_base(view, torch.float32)).state_dict()
    wanted = {
        f"model.layers.{layer}.mlp.experts.{part}": torch.cat([torch.stack(dense[found + key]) for key in keys], 1)
        for layer in (0, 1)
        for found in [next(key for key in dense if f"layers.{layer}." in key).removesuffix("w1")]
        for part, keys in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))
    }
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name
    rows = open_base(experts_base(tmp_path / "b", "rows"))
    assert own_quantiser.own_quantiser(rows) is None
    assert "rounds the weights of experts differently" in own_quantiser.quantiser_note(rows)


@pytest.mark.parametrize("kind", ["nf4", "W4A16", "FP8_BLOCK"])
def test_a_wrong_reader_is_seen(
    kind: str,
    bases: Callable[[str], Base],
    loras: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It makes a wrong merge, and weights to compare with that are wrong in the same way."""
    base, _ = bases(kind)
    lora = loras(256 if kind == "FP8_BLOCK" else 128)
    options = VerifyOptions(generated=2)
    merge(base, lora, tmp_path / "right", MergeOptions(write_as="float32"))
    right = verify(base, lora, tmp_path / "right", options)
    assert right.passed, right.problems
    assert any("as transformers" in note for note in right.as_json()["notes"])
    spoil_readers(base, monkeypatch)
    merge(base, lora, tmp_path / "wrong", MergeOptions(write_as="float32"))
    wrong = verify(base, lora, tmp_path / "wrong", options)
    assert any("live adapter computes other weights" in problem for problem in wrong.problems)
    assert any("dlogit" in problem for problem in wrong.problems)


@pytest.mark.parametrize("kind", READ_HERE)
def test_what_transformers_cannot_load_is_read_here_and_said(
    kind: str, bases: Callable[[str], Base], loras: Callable[[int], Path], tmp_path: Path
) -> None:
    base, _ = bases(kind)
    merge(base, loras(128), tmp_path / "out", MergeOptions(write_as="float32"))
    report = verify(base, loras(128), tmp_path / "out", VerifyOptions(generated=2))
    assert report.passed, report.problems
    assert [
        note
        for note in report.as_json()["notes"]
        if f"as adapter-merge dequantises them: transformers cannot load {kind}" in note
    ]
    weights = verify(base, loras(128), tmp_path / "out", VerifyOptions(weights_only=True))
    assert not [note for note in weights.as_json()["notes"] if "models run" in note]


def test_what_transformers_dequantises_otherwise_is_read_here(
    bases: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4, _ = bases("W4A16")
    (name,) = (name for name in tensors_of(int4) if name.endswith("0.self_attn.q_proj.weight_packed"))
    index = (torch.arange(128) // 64).int().flip(0)
    sorted_columns = tensors_of(int4) | {name.replace("weight_packed", "weight_g_idx"): index}
    groups = config_of(int4)["quantization_config"]["config_groups"]
    first = groups["group_0"]
    two = {
        "a": first | {"targets": ["re:.*self_attn.*"]},
        "b": first | {"targets": ["re:.*mlp.*"]},
    }
    nf4, _ = quantised("nf4", tmp_path / "nf4", 96)
    cases = {
        "weight_g_idx": rewrite(int4, tmp_path / "g_idx", sorted_columns),
        "several config_groups": rewrite(int4, tmp_path / "groups", tensors_of(int4), config_groups=two),
        "a new block in each row": nf4,
    }
    for words, folder in cases.items():
        view = open_base(folder)
        assert own_quantiser.own_quantiser(view) is None
        note = own_quantiser.quantiser_note(view)
        assert "as adapter-merge dequantises them" in note and words in note, note
    stated = open_trained_base(nf4.with_name("nf4-plain"), "nf4")
    assert own_quantiser.own_quantiser(stated) is None
    assert "--trained-on states" in own_quantiser.quantiser_note(stated)
    with monkeypatch.context() as older:
        older.delattr(HfQuantizer, "get_load_operations")
        assert "can only dequantise whole models" in own_quantiser.quantiser_note(open_base(int4))
    monkeypatch.setattr(own_quantiser, "find_spec", lambda name: None)
    assert "transformers needs compressed_tensors" in own_quantiser.quantiser_note(open_base(int4))
