"""FP8 checkpoints of transformers and DeepSeek, packed and dequantised by transformers and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from packed_files import WEIGHT, all_rows, find, retention, write_checkpoint, write_packed
from safetensors.torch import load_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

SCALE = f"{WEIGHT}_scale_inv"


def quantizer(block: list[int] | None, scales: str = "float") -> Any:
    return SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block, scale_fmt=scales))


def config(block: list[int] | None, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block, **changes}


def weight_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator) * torch.rand(shape[-2], 1, generator=generator)


@pytest.mark.parametrize("step", [0, 48])
def test_blocks_as_transformers(step: int, tmp_path: Path) -> None:
    packed = Fp8Quantize(quantizer([128, 128])).convert({WEIGHT: weight_of(256, 384)})
    folder = write_checkpoint(tmp_path, packed, config([128, 128]))
    expected = Fp8Dequantize(quantizer([128, 128]))._dequantize_one(packed[WEIGHT], packed[SCALE])
    rows = all_rows(folder, step=step)
    assert rows.dtype == expected.dtype == torch.float32
    assert torch.equal(rows, expected)
    assert find(folder).side == {SCALE}
    assert find(folder).weights[WEIGHT].scheme == "fp8 block 128x128"


def test_scales_of_powers_of_two(tmp_path: Path) -> None:
    packed = Fp8Quantize(quantizer([16, 32], "ue8m0")).convert({WEIGHT: weight_of(64, 96)})
    assert packed[SCALE].dtype == torch.float8_e8m0fnu
    expected = Fp8Dequantize(quantizer([16, 32]))._dequantize_one(packed[WEIGHT], packed[SCALE])
    folder = write_checkpoint(tmp_path / "base", packed, config([16, 32], scale_fmt="ue8m0"))
    rows = all_rows(folder)
    assert rows.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(rows, expected)
    packed[SCALE] = packed[SCALE].view(torch.uint8)
    stored_as_bytes = write_checkpoint(tmp_path / "bytes", packed, config([16, 32], scale_fmt="ue8m0"))
    assert torch.equal(all_rows(stored_as_bytes), expected)
    out = write_packed(folder, tmp_path / "out", WEIGHT, 3 * expected.float())
    again = load_file(out / "model.safetensors")
    tripled = Fp8Dequantize(quantizer([16, 32]))._dequantize_one(again[WEIGHT], again[SCALE])
    assert retention(tripled, expected, 3 * expected.float()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_do_not_divide(dtype: torch.dtype, tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj has 4.5 blocks of rows. compressed-tensors cuts the last; transformers refuses the grid."""
    weight = weight_of(72, 80).to(torch.float8_e4m3fn)
    scale = (torch.rand(5, 3) * 0.01).to(dtype)
    folder = write_checkpoint(tmp_path, {WEIGHT: weight, SCALE: scale}, config([16, 32]))
    library = FP8BlockDequantizer(weight_block_size=(16, 32), dtype=dtype)
    expected = library.process({WEIGHT: weight, SCALE: scale})[WEIGHT]
    assert torch.equal(all_rows(folder), expected)
    assert torch.equal(all_rows(folder, step=5), expected)


def test_stacked_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    packed = Fp8Quantize(quantizer([16, 32])).convert({name: weight_of(3, 48, 64)})
    folder = write_checkpoint(tmp_path / "base", packed, config([16, 32]))
    expected = Fp8Dequantize(quantizer([16, 32]))._dequantize_one(packed[name], packed[f"{name}_scale_inv"])
    assert torch.equal(all_rows(folder, name), expected)
    assert torch.equal(all_rows(folder, name, step=20), expected)
    wanted = expected + 0.1 * weight_of(3, 48, 64).flip(1)
    out = load_file(write_packed(folder, tmp_path / "out", name, wanted) / "model.safetensors")
    again = Fp8Dequantize(quantizer([16, 32]))._dequantize_one(out[name], out[f"{name}_scale_inv"])
    assert retention(again, expected, wanted) == pytest.approx(1, abs=0.02)


def test_one_scale(tmp_path: Path) -> None:
    """Static FP8: one scale per weight, and a scale of the activations that vanishes."""
    weight, scale = weight_of(40, 48).to(torch.float8_e4m3fn), torch.tensor(0.0123)
    expected = Fp8Dequantize(quantizer(None))._dequantize_one(weight, scale.reshape(1, 1))
    activation = WEIGHT.removesuffix("weight") + "activation_scale"
    tensors = {WEIGHT: weight, SCALE: scale, activation: torch.tensor(0.1)}
    folder = write_checkpoint(tmp_path / "inverse", tensors, config(None, activation_scheme="static"))
    assert torch.equal(all_rows(folder), expected)
    assert find(folder).side == {SCALE, activation}
    named_as_autofp8 = {WEIGHT: weight, f"{WEIGHT}_scale": scale.reshape(1)}
    folder = write_checkpoint(tmp_path / "autofp8", named_as_autofp8, config(None, activation_scheme="static"))
    assert torch.equal(all_rows(folder), expected)


def test_rows_of_fbgemm(tmp_path: Path) -> None:
    """fbgemm's kernel needs a GPU and computes (x Wq) times float32 scales: W is the product in float32."""
    weight, scale = weight_of(40, 48).to(torch.float8_e4m3fn), torch.rand(40, 1) * 0.01
    quantization = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    folder = write_checkpoint(tmp_path, {WEIGHT: weight, f"{WEIGHT}_scale": scale}, quantization)
    exact = weight.double() * scale.double()
    assert torch.equal(all_rows(folder), exact.float())


@pytest.mark.parametrize("block", [[16, 32], None])
def test_requantised(block: list[int] | None, tmp_path: Path) -> None:
    packed = Fp8Quantize(quantizer(block)).convert({WEIGHT: weight_of(64, 96)})
    folder = write_checkpoint(tmp_path / "base", packed, config(block))
    stored = Fp8Dequantize(quantizer(block))._dequantize_one(
        packed[WEIGHT], packed[SCALE].reshape(-1, 3 if block else 1)
    )
    wanted = stored + torch.outer(torch.randn(64), torch.randn(96)) * 0.05 * stored.std()
    out = load_file(write_packed(folder, tmp_path / "out", WEIGHT, wanted) / "model.safetensors")
    again = Fp8Dequantize(quantizer(block))._dequantize_one(out[WEIGHT], out[SCALE].reshape(-1, 3 if block else 1))
    assert retention(again, stored, wanted) == pytest.approx(1, abs=0.1)
    assert float((again - wanted).abs().max()) <= float(wanted.abs().max()) / 8  # one step of E4M3
