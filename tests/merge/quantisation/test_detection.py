"""Bad input: what detection refuses, in which words, and that no damage is read as another weight or crashes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_awq
import test_bitsandbytes
import test_fp4
import test_fp8
import test_gptq
import torch
from packed_files import LINEAR, WEIGHT, all_rows, find, write_checkpoint
from test_compressed_tensors import ARGUMENTS, config_of, packed_by_library, random_weight
from torch import Tensor

from adapter_merge.errors import AdapterMergeError, FileFormatError, UnsupportedError

Case = tuple[dict[str, Tensor], dict[str, Any], str]  # tensors, quantization_config, name of the weight


def gptq() -> Case:
    tensors, _ = test_gptq.checkpoint(4, torch.arange(test_gptq.IN) // 32, 1)
    return tensors, test_gptq.config(4, 32, 1), WEIGHT


def awq() -> Case:
    codes = torch.randint(0, 16, (96, 64), generator=torch.Generator().manual_seed(0))
    tensors = {f"{LINEAR}.qweight": test_awq.words(codes), f"{LINEAR}.qzeros": test_awq.words(codes[:3]),
               f"{LINEAR}.scales": torch.rand(3, 64).half()}  # fmt: skip
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return tensors, config, WEIGHT


def fp8() -> Case:
    packed = test_fp8.Fp8Quantize(test_fp8.quantizer([16, 32])).convert({WEIGHT: test_fp8.weight_of(64, 96)})
    return packed, test_fp8.config([16, 32]), WEIGHT


def nf4() -> Case:
    tensors = test_bitsandbytes.packed(test_bitsandbytes.weight_of(64, 128), compress_statistics=True)
    return tensors, dict(test_bitsandbytes.CONFIG), WEIGHT


def int8() -> Case:
    tensors = test_bitsandbytes.int8_of(test_bitsandbytes.weight_of(40, 56, torch.float16))
    return tensors, dict(test_bitsandbytes.CONFIG), WEIGHT


def mxfp4() -> Case:
    return test_fp4.experts_of(2, 40, 96), dict(test_fp4.GPT_OSS), test_fp4.EXPERTS


def modelopt() -> Case:
    tensors = test_fp4.modelopt_of(torch.randn(48, 96, generator=torch.Generator().manual_seed(2)).bfloat16())
    return tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, WEIGHT


CASES: dict[str, Callable[[], Case]] = {
    "gptq": gptq, "awq": awq, "fp8": fp8, "nf4": nf4, "bitsandbytes int8": int8, "gpt-oss": mxfp4, "modelopt": modelopt,
}  # fmt: skip
CASES |= {
    name: lambda name=name: (packed_by_library(name, random_weight(torch.bfloat16)), config_of(name), WEIGHT)  # type: ignore[misc]
    for name in ARGUMENTS
}


def words(error: pytest.ExceptionInfo[AdapterMergeError]) -> str:
    return str(error.value)


@pytest.mark.parametrize("method", ["aqlm", "hqq", "quark", None, 3])
def test_unknown_methods(method: Any, tmp_path: Path) -> None:
    tensors, _, _ = fp8()
    with pytest.raises(UnsupportedError) as error:
        find(write_checkpoint(tmp_path, tensors, {"quant_method": method}))
    assert f"quant_method {method!r}" in words(error)


@pytest.mark.parametrize(("case", "change", "expected"), [
    ("gptq", {"bits": 3}, ["unsupported value of bits", "3"]),
    ("gptq", {"checkpoint_format": "marlin"}, ["unsupported value of checkpoint_format", "marlin"]),
    ("gptq", {"is_marlin_format": True}, ["unsupported value of is_marlin_format"]),
    ("gptq", {"group_size": 0}, ["unsupported value of group_size", "0"]),
    ("gptq", {"hyb_act": True}, ["unknown keys for quant_method gptq", "hyb_act True"]),
    ("gptq", {"rotation": "hadamard"}, ["unsupported value of rotation", "hadamard"]),
    ("awq", {"version": "gemv"}, ["unsupported value of version", "gemv"]),
    ("awq", {"bits": 3}, ["unsupported value of bits"]),
    ("awq", {"zero_point": None}, ["unsupported value of zero_point"]),
    ("fp8", {"fmt": "e5m2"}, ["unsupported value of fmt", "e5m2"]),
    ("fp8", {"expert_dtype": "fp4"}, ["unsupported value of expert_dtype"]),
    ("fp8", {"weight_block_size": [128]}, ["unsupported value of weight_block_size", "[128]"]),
    ("nf4", {"bnb_5bit": True}, ["unknown keys for quant_method bitsandbytes", "bnb_5bit"]),
    ("modelopt", {"quant_algo": "W4A8_AWQ"}, ["unsupported value of quant_algo", "W4A8_AWQ"]),
    ("int4 group", {"format": "marlin-24"}, ["unsupported value of format", "marlin-24"]),
    ("int4 group", {"quantization_status": "calibration"}, ["unsupported value of quantization_status", "calibration"]),
    ("modelopt", {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}},
     ["unsupported value of quantized_layers", "W4A8_AWQ"]),
    ("int4 group", {"transform_config": {"config_groups": {"u": {}}}}, ["transform_config", "rotate"]),
    ("int4 group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config"]),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_unknown_settings(case: str, change: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    tensors, config, _ = CASES[case]()
    with pytest.raises(UnsupportedError) as error:
        find(write_checkpoint(tmp_path, tensors, config | change))
    for text in expected:
        assert text in words(error)


@pytest.mark.parametrize(("change", "expected"), [
    ({"num_bits": 3}, "int 4"), ({"num_bits": "4"}, "'4'"), ({"type": "fp"}, "unsupported value of type"),
    ({"strategy": "token"}, "unsupported value of strategy"), ({"group_size": 0}, "unsupported value of group_size"),
    ({"group_size": None}, "unsupported value of group_size"), ({"dynamic": True}, "dynamic quantisation"),
    ({"zeros": 1}, "zeros"),
], ids=str)  # fmt: skip
def test_unknown_arguments(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config = copy.deepcopy(config_of("int4 group"))
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(UnsupportedError) as error:
        find(write_checkpoint(tmp_path, packed_by_library("int4 group", random_weight(torch.bfloat16)), config))
    assert expected in words(error)


def test_all_problems_at_once(tmp_path: Path) -> None:
    """Every weight with the same fault is in one problem, every other fault in its own."""
    tensors, config, _ = fp8()
    layers = {f"model.layers.{i}.mlp.up_proj.weight": tensors[WEIGHT].clone() for i in range(8)}
    scales = {f"{name}_scale_inv": tensors[f"{WEIGHT}_scale_inv"][:, :2].clone() for name in layers}
    with pytest.raises(FileFormatError) as error:
        find(write_checkpoint(tmp_path, {WEIGHT: tensors[WEIGHT], **layers, **scales}, config))
    assert len(error.value.problems) == 2
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" in words(error)
    assert "and 3 more" in words(error)
    assert "[4, 3]" in words(error) and "[4, 2]" in words(error)
    assert f"{WEIGHT}: the tensor weight_scale_inv of this weight is missing" in words(error)


def test_conv1d_models(tmp_path: Path) -> None:
    """Quantisers store the transpose of Conv1D weights, which square ones would hide."""
    tensors, config, _ = nf4()
    folder = write_checkpoint(tmp_path, tensors, config)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "quantization_config": config}))
    with pytest.raises(UnsupportedError, match="with Conv1D layers"):
        find(folder)


@pytest.mark.parametrize("name", ["fp8 row", "w8a8 row", "int4 group"])
def test_older_status(name: str, tmp_path: Path) -> None:
    """Older compressed-tensors files are compressed and state "frozen"; plain weights beside scales stay refused."""
    tensors = packed_by_library(name, random_weight(torch.bfloat16))
    config = config_of(name, quantization_status="frozen")
    assert list(find(write_checkpoint(tmp_path / "stored", tensors, config)).weights) == [WEIGHT]
    plain = {WEIGHT: random_weight(torch.bfloat16), f"{WEIGHT}_scale": tensors[f"{WEIGHT}_scale"]}
    with pytest.raises(FileFormatError, match="belongs to no quantised weight"):
        find(write_checkpoint(tmp_path / "plain", plain, config))


def test_mixed_modelopt(tmp_path: Path) -> None:
    """MIXED_PRECISION: NVFP4 and FP8 layers side by side, told apart by their tensors."""
    tensors, _, _ = modelopt()
    other = "model.layers.0.self_attn.o_proj.weight"
    tensors |= {other: torch.randn(16, 16).to(torch.float8_e4m3fn), f"{other}_scale": torch.tensor(0.1)}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
              "quantized_layers": {LINEAR: {"quant_algo": "NVFP4"}, "o_proj": {"quant_algo": "FP8"}}}  # fmt: skip
    found = find(write_checkpoint(tmp_path, tensors, config)).weights
    assert {name: weight.scheme for name, weight in found.items()} == {WEIGHT: "nvfp4", other: "fp8 tensor"}


def test_no_config(tmp_path: Path) -> None:
    tensors, _, _ = fp8()
    with pytest.raises(FileFormatError, match=r"config\.json has no quantization_config"):
        find(write_checkpoint(tmp_path, tensors, None))


def test_plain_checkpoints_are_plain(tmp_path: Path) -> None:
    """No quantised tensor: nothing is packed, whatever an outdated config says."""
    tensors = {WEIGHT: torch.randn(4, 8)}
    assert find(write_checkpoint(tmp_path / "plain", tensors, None)).weights == {}
    assert find(write_checkpoint(tmp_path / "stale", tensors, {"quant_method": "unheard of"})).weights == {}


def test_ignored_module_that_is_quantised(tmp_path: Path) -> None:
    tensors = packed_by_library("int4 group", random_weight(torch.bfloat16))
    for pattern in (LINEAR, "re:.*q_proj$"):
        with pytest.raises(FileFormatError, match="lists its module in ignore"):
            find(write_checkpoint(tmp_path / pattern[:2], tensors, config_of("int4 group", ignore=[pattern])))


def test_scheme_that_contradicts_the_config(tmp_path: Path) -> None:
    """INT4 tensors with a config of FP8, of another group size, of asymmetric weights."""
    tensors = packed_by_library("int4 group", random_weight(torch.bfloat16))
    for name, expected in (("fp8 row", "is not stored in the format of the config's group group_0"),
                           ("int4 row", "does not have the shape"), ("int8 group", "does not have the shape"),
                           ("int4 group asymmetric", "does not have the shape")):  # fmt: skip
        with pytest.raises(FileFormatError, match=expected):
            find(write_checkpoint(tmp_path / name.replace(" ", "_"), tensors, config_of(name)))


def test_groups_by_target(tmp_path: Path) -> None:
    """A name wins over a pattern, a pattern over a class; each module takes its own group."""
    int4 = packed_by_library("int4 group", random_weight(torch.bfloat16))
    row = packed_by_library("fp8 row", random_weight(torch.bfloat16))
    other = "model.layers.1.mlp.down_proj"
    tensors = int4 | {name.replace(LINEAR, other): part for name, part in row.items()}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": ARGUMENTS["int4 group"][1], "format": "pack-quantized"},
        "group_1": {"targets": [r"re:.*\.down_proj"], "weights": ARGUMENTS["fp8 row"][1], "format": "float-quantized"},
    }
    config = config_of("int4 group", format="mixed-precision", config_groups=groups)
    found = find(write_checkpoint(tmp_path, tensors, config)).weights
    assert {name: weight.scheme for name, weight in found.items()} == {
        WEIGHT: "pack-quantized int4 g32", f"{other}.weight": "fp8 row"}  # fmt: skip


def damaged(tensors: dict[str, Tensor], config: dict[str, Any], dice: random.Random) -> None:
    """Damage one thing in place: a tensor gone, cut, of another dtype or shape, renamed, or a value of the config."""
    name = dice.choice(sorted(tensors))
    kind = dice.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1 and tensors[name].ndim and tensors[name].numel():
        axis = dice.randrange(tensors[name].ndim)
        tensors[name] = tensors[name].narrow(axis, 0, dice.randrange(tensors[name].shape[axis]))
    elif kind == 2:
        tensors[name] = tensors[name].contiguous().view(-1).view(torch.uint8)
    elif kind == 3:
        tensors[name] = tensors[name].reshape(-1)[None]
    elif kind == 4:
        tensors[name.replace("q_proj", "k_proj").replace("down_proj", "up_proj")] = tensors.pop(name)
    elif kind == 5:
        tensors[name] = tensors[name].to(dice.choice([torch.float32, torch.int32, torch.bool, torch.float64]))
    else:
        place: Any = config
        while True:
            key = dice.choice(sorted(place))
            if not isinstance(place[key], dict) or not place[key]:
                break
            place = place[key]
        place[key] = dice.choice([None, 0, -1, 7, "x", [], {}, 1e30, True, "re:(", [1, 2]])


@pytest.mark.parametrize("name", CASES)
def test_damage(name: str, tmp_path: Path) -> None:
    """60 damaged checkpoints: refused with an error of ours, or the weight is read as it was packed.

    Parts that agree with each other in another shape or another precision are another checkpoint, not a damaged one.
    """
    tensors, config, weight = CASES[name]()
    sound = all_rows(write_checkpoint(tmp_path / "sound", tensors, config), weight)
    dice = random.Random(name)
    refused = 0
    for number in range(60):
        parts, settings = dict(tensors), copy.deepcopy(config)
        damaged(parts, settings, dice)
        folder = write_checkpoint(tmp_path / str(number), parts, settings)
        try:
            found = find(folder)
            if weight not in found.weights:
                assert not any(part.startswith(weight.removesuffix(".weight")) for part in found.side)
                continue
            rows = all_rows(folder, weight)
        except AdapterMergeError:
            refused += 1
            continue
        if (rows.shape, rows.dtype) == (sound.shape, sound.dtype):
            assert torch.equal(rows, sound), json.dumps(settings)
    assert refused > 20


@pytest.mark.parametrize("name", ["nf4", "gptq", "int4 group", "fp8"])
def test_noise_in_small_parts(name: str, tmp_path: Path) -> None:
    """Random bytes in the parts that detection or `rows` interpret: refused, or some weight; never a crash."""
    tensors, config, weight = CASES[name]()
    dice = random.Random(name)
    for number in range(40):
        parts = dict(tensors)
        part = dice.choice(sorted(item for item in parts if parts[item].numel() < 1000))
        raw = bytearray(parts[part].contiguous().view(-1).view(torch.uint8).tolist())
        for _ in range(dice.randrange(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        noisy = torch.frombuffer(raw, dtype=torch.uint8)
        parts[part] = noisy.view(parts[part].dtype).reshape(parts[part].shape)
        folder = write_checkpoint(tmp_path / str(number), parts, config)
        try:
            rows = all_rows(folder, weight)
        except AdapterMergeError:
            continue
        assert rows.shape == find(folder).weights[weight].shape
