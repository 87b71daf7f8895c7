"""FP4 checkpoints of gpt-oss (MXFP4) and ModelOpt (NVFP4), against transformers, compressed-tensors and the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from packed_files import LINEAR, WEIGHT, all_rows, find, retention, write_checkpoint, write_packed
from safetensors.torch import load_file
from test_compressed_tensors import packed_by_library
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

EXPERTS = "model.layers.0.mlp.experts.down_proj"
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def experts_of(experts: int, rows: int, columns: int) -> dict[str, Tensor]:
    """A stack as gpt-oss stores it: each expert packed by compressed-tensors, whose MXFP4 has the same bytes."""
    generator = torch.Generator().manual_seed(1)
    packs = [packed_by_library("mxfp4", torch.randn(rows, columns, generator=generator).bfloat16() * (expert + 1))
             for expert in range(experts)]  # fmt: skip
    blocks = torch.stack([pack[f"{LINEAR}.weight_packed"] for pack in packs])
    scales = torch.stack([pack[f"{LINEAR}.weight_scale"] for pack in packs])
    return {f"{EXPERTS}_blocks": blocks.view(experts, rows, columns // 32, 16), f"{EXPERTS}_scales": scales}


def test_stacked_experts_as_transformers(tmp_path: Path) -> None:
    tensors = experts_of(3, 40, 96)
    tensors[f"{EXPERTS}_scales"][0, :2] = torch.tensor([0, 1, 250], dtype=torch.uint8)
    folder = write_checkpoint(tmp_path, tensors, GPT_OSS)
    expected = convert_moe_packed_tensors(tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"])
    assert expected.shape == (3, 96, 40)
    for step in (0, 50, 7):
        assert torch.equal(all_rows(folder, EXPERTS, step), expected)
    assert find(folder).side == set(tensors)


def test_stacked_experts_requantised(tmp_path: Path) -> None:
    tensors = experts_of(2, 40, 96)
    folder = write_checkpoint(tmp_path / "base", tensors, GPT_OSS)
    stored = convert_moe_packed_tensors(tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"]).float()
    wanted = stored + torch.randn(2, 96, 1) * torch.randn(2, 1, 40) * 0.3 * stored.std()
    out = load_file(write_packed(folder, tmp_path / "out", EXPERTS, wanted) / "model.safetensors")
    again = convert_moe_packed_tensors(out[f"{EXPERTS}_blocks"], out[f"{EXPERTS}_scales"]).float()
    assert retention(again, stored, wanted) == pytest.approx(1, abs=0.1)
    assert float((again - wanted).norm()) < 0.15 * float(wanted.norm())


def modelopt_of(weight: Tensor) -> dict[str, Tensor]:
    packed = packed_by_library("nvfp4", weight)
    return {WEIGHT: packed[f"{LINEAR}.weight_packed"], f"{WEIGHT}_scale": packed[f"{LINEAR}.weight_scale"],
            f"{WEIGHT}_scale_2": 1 / packed[f"{LINEAR}.weight_global_scale"].reshape(()),
            f"{LINEAR}.input_scale": torch.tensor(0.01)}  # fmt: skip


def modelopt_formula(tensors: dict[str, Tensor]) -> Tensor:
    """ModelOpt's NVFP4QTensor.dequantize, in float64 but for its two float32 roundings and the one to bfloat16."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
    raw = tensors[WEIGHT].long()
    codes = torch.stack((raw & 15, raw >> 4), -1).flatten(1)
    scale = (tensors[f"{WEIGHT}_scale"].double() * tensors[f"{WEIGHT}_scale_2"].double()).float().double()
    return (values[codes] * scale.repeat_interleave(16, 1)).float().bfloat16()


@pytest.mark.parametrize("config", [
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.47"},
     "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"]}}},
], ids=["config.json"])  # fmt: skip
def test_modelopt(config: dict[str, object], tmp_path: Path) -> None:
    tensors = modelopt_of(torch.randn(48, 96, generator=torch.Generator().manual_seed(2)).bfloat16())
    folder = write_checkpoint(tmp_path, tensors, config)
    rows = all_rows(folder, step=7)
    assert torch.equal(rows, modelopt_formula(tensors))
    assert find(folder).side == set(tensors) - {WEIGHT}
    converted = ModelOptNvfp4Converter(targets=("Linear",)).process(dict(tensors))
    state = {name.removeprefix(f"{LINEAR}."): part for name, part in converted.items()}
    state["weight_global_scale"] = state["weight_global_scale"].reshape(1)
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4A16)
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(state, scheme)["weight"]
    assert float((rows.float() - library.float()).abs().max()) <= 2**-8 * float(library.abs().max())
    assert float((rows != library).float().mean()) < 1e-3  # 1 / (1 / scale) is another float32 now and then


def test_modelopt_side_file(tmp_path: Path) -> None:
    """Older ModelOpt checkpoints state their config in hf_quant_config.json alone."""
    tensors = modelopt_of(torch.randn(48, 96, generator=torch.Generator().manual_seed(2)).bfloat16())
    folder = write_checkpoint(tmp_path, tensors, None)
    text = '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": null, "exclude_modules": ["lm_head"]}}'  # noqa: E501
    (folder / "hf_quant_config.json").write_text(text)
    assert torch.equal(all_rows(folder), modelopt_formula(tensors))


def test_modelopt_fp8(tmp_path: Path) -> None:
    weight, scale = torch.randn(32, 48).to(torch.float8_e4m3fn), torch.tensor(0.0123)
    tensors = {WEIGHT: weight, f"{WEIGHT}_scale": scale, f"{LINEAR}.input_scale": torch.tensor(0.1)}
    folder = write_checkpoint(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert torch.equal(all_rows(folder), (weight.double() * scale.double()).float())
    assert find(folder).side == set(tensors) - {WEIGHT}


def test_modelopt_requantised(tmp_path: Path) -> None:
    tensors = modelopt_of(torch.randn(48, 96, generator=torch.Generator().manual_seed(2)).bfloat16())
    folder = write_checkpoint(tmp_path / "base", tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    stored = modelopt_formula(tensors).float()
    wanted = stored + torch.outer(torch.randn(48), torch.randn(96)) * 0.3
    out = load_file(write_packed(folder, tmp_path / "out", WEIGHT, wanted) / "model.safetensors")
    assert retention(modelopt_formula(out).float(), stored, wanted) == pytest.approx(1, abs=0.1)
