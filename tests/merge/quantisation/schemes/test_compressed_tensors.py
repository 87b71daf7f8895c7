"""compressed-tensors' formats: packed by compressed-tensors, dequantised as compressed-tensors does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from packed_files import LINEAR, WEIGHT, all_rows, find, read, retention, write_checkpoint, write_packed
from safetensors.torch import load_file
from torch import Tensor

INT = {"type": "int", "num_bits": 4}
FP8 = {"type": "float", "num_bits": 8}
ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 group": ("pack-quantized", {**INT, "strategy": "group", "group_size": 32}),
    "int4 group asymmetric": ("pack-quantized", {**INT, "strategy": "group", "group_size": 16, "symmetric": False}),
    "int4 row": ("pack-quantized", {**INT, "strategy": "channel"}),
    "int4 row asymmetric": ("pack-quantized", {**INT, "strategy": "channel", "symmetric": False}),
    "int4 tensor": ("pack-quantized", {**INT, "strategy": "tensor"}),
    "int8 group": ("pack-quantized", {**INT, "num_bits": 8, "strategy": "group", "group_size": 32}),
    "int8 group asymmetric": (
        "pack-quantized", {**INT, "num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "w8a8 row": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "w8a8 tensor": ("int-quantized", {**INT, "num_bits": 8, "strategy": "tensor"}),
    "w8a8 row asymmetric": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8 tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 row": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8 group": ("naive-quantized", {**FP8, "strategy": "group", "group_size": 32}),
    "fp8 block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 32]}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}  # fmt: skip
REQUANTISED = ("int4 group", "int4 group asymmetric", "int4 row", "int8 group", "fp8 tensor", "fp8 row", "fp8 block",
               "nvfp4", "mxfp4")  # fmt: skip


def scheme_of(name: str) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**ARGUMENTS[name][1]))


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    form, arguments = ARGUMENTS[name]
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}}, "ignore": ["lm_head"],
            **changes}  # fmt: skip


def parameters(weight: Tensor, arguments: QuantizationArgs) -> dict[str, Tensor]:
    """Scales and zero points that compressed-tensors computes for `weight`."""
    blocks, overall = weight, None
    if arguments.strategy in ("group", "tensor_group"):
        blocks = weight.unflatten(-1, (-1, arguments.group_size))
    elif arguments.strategy == "block":
        rows, columns = arguments.block_structure
        pad = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        padded = torch.nn.functional.pad(weight, pad)
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    found: dict[str, Tensor] = {}
    if arguments.strategy == "tensor_group":
        overall = found["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    if arguments.strategy == "tensor":
        low, high = weight.amin(), weight.amax()
    else:
        low, high = blocks.amin(-1, keepdim=arguments.strategy == "channel"), blocks.amax(
            -1, keepdim=arguments.strategy == "channel")  # fmt: skip
    scale, zero = calculate_qparams(low, high, arguments, global_scale=overall)
    return {**found, "weight_scale": scale, "weight_zero_point": zero}


def packed_by_library(name: str, weight: Tensor) -> dict[str, Tensor]:
    scheme = scheme_of(name)
    compressor = BaseCompressor.get_value_from_registry(ARGUMENTS[name][0])
    state = {"weight": weight, **parameters(weight, scheme.weights)}
    return {f"{LINEAR}.{part}": tensor for part, tensor in compressor.compress(state, scheme).items()}


def unpacked_by_library(name: str, tensors: dict[str, Tensor]) -> Tensor:
    compressor = BaseCompressor.get_value_from_registry(ARGUMENTS[name][0])
    state = {part.removeprefix(f"{LINEAR}."): tensor for part, tensor in tensors.items() if part.startswith(LINEAR)}
    weight: Tensor = compressor.decompress(state, scheme_of(name))["weight"]
    return weight


def random_weight(dtype: torch.dtype, shape: tuple[int, int] = (72, 160)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_rows_are_the_librarys(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every format and strategy, all at once and in blocks of rows that meet no edge of a block of scales."""
    tensors = packed_by_library(name, random_weight(dtype))
    folder = write_checkpoint(tmp_path, tensors, config_of(name))
    expected = unpacked_by_library(name, tensors)
    for step in (0, 7):
        rows = all_rows(folder, step=step)
        assert rows.dtype == expected.dtype
        assert torch.equal(rows, expected)
    assert find(folder).side == set(tensors) - {WEIGHT}


@pytest.mark.parametrize("name", REQUANTISED)
def test_requantised_weights_hold_the_change(name: str, tmp_path: Path) -> None:
    """The library unpacks what is packed here; it keeps more of the change than the stored codes alone would."""
    tensors = packed_by_library(name, random_weight(torch.bfloat16))
    folder = write_checkpoint(tmp_path / "base", tensors, config_of(name))
    stored = unpacked_by_library(name, tensors).float()
    change = torch.outer(torch.randn(72), torch.randn(160)) * 0.3 * stored.std()
    out = write_packed(folder, tmp_path / "out", WEIGHT, stored + change)
    packed = unpacked_by_library(name, load_file(out / "model.safetensors"))
    assert torch.equal(all_rows(out), packed)
    assert retention(packed, stored, stored + change) == pytest.approx(1, abs=0.1)
    step = float((unpacked_by_library(name, packed_by_library(name, stored + change)) - stored - change).abs().mean())
    assert float((packed - stored - change).abs().mean()) < 1.5 * step


@pytest.mark.parametrize("name", REQUANTISED)
def test_small_changes_are_retained(name: str, tmp_path: Path) -> None:
    """A change of 1 % of the weight's norm: rounding to the nearest code loses most of it, `pack` keeps it.

    What is kept varies by the noise of the drawn codes over the root of the number of elements, here 0.02.
    """
    tensors = packed_by_library(name, random_weight(torch.bfloat16, (512, 512)))
    folder = write_checkpoint(tmp_path / "base", tensors, config_of(name))
    weight = find(folder).weights[WEIGHT]
    stored = unpacked_by_library(name, tensors).float()
    generator = torch.Generator().manual_seed(11)
    change = torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    wanted = stored + change * (0.01 * stored.norm() / change.norm())
    nearest = next(iter(weight.candidates(wanted, read)))
    kept = {weight.parts[role].name: tensor for role, tensor in nearest.items()}
    lost = 1 - retention(unpacked_by_library(name, tensors | kept), stored, wanted)
    out = load_file(write_packed(folder, tmp_path / "out", WEIGHT, wanted) / "model.safetensors")
    again = 1 - retention(unpacked_by_library(name, out), stored, wanted)
    assert abs(again) < 0.1
    assert lost > (0.05 if name == "int8 group" else 0.4)


@pytest.mark.parametrize("name", REQUANTISED)
def test_unchanged_weights_stay(name: str, tmp_path: Path) -> None:
    """A weight that does not change is the same after requantisation."""
    tensors = packed_by_library(name, random_weight(torch.bfloat16))
    folder = write_checkpoint(tmp_path / "base", tensors, config_of(name))
    stored = unpacked_by_library(name, tensors)
    out = write_packed(folder, tmp_path / "out", WEIGHT, stored.float())
    assert torch.equal(unpacked_by_library(name, load_file(out / "model.safetensors")), stored)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_activation_order(asymmetric: bool, tmp_path: Path) -> None:
    """weight_g_idx gives each column its scale; compressed-tensors 0.20 reads the sorted columns, put back here."""
    name = "int4 group asymmetric" if asymmetric else "int4 group"
    size = ARGUMENTS[name][1]["group_size"]
    weight = random_weight(torch.bfloat16)
    order = torch.randperm(160)
    groups = torch.empty(160, dtype=torch.int32)
    groups[order] = torch.arange(160, dtype=torch.int32) // size
    by_group = torch.argsort(groups, stable=True)
    tensors = packed_by_library(name, weight[:, by_group])
    expected = unpacked_by_library(name, tensors)[:, torch.argsort(by_group)]
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(tensors[f"{LINEAR}.weight_packed"], 4, torch.Size((72, 160)))
    tensors[f"{LINEAR}.weight_packed"] = pack_to_int32(codes[:, torch.argsort(by_group)].contiguous(), 4)
    tensors[f"{LINEAR}.weight_g_idx"] = groups
    folder = write_checkpoint(tmp_path / "base", tensors, config_of(name))
    assert torch.equal(all_rows(folder), expected)
    out = write_packed(folder, tmp_path / "out", WEIGHT, expected.float())
    assert torch.equal(all_rows(out), expected)
    tensors[f"{LINEAR}.weight_g_idx"] = torch.full((160,), -1, dtype=torch.int32)
    plain = write_checkpoint(tmp_path / "plain", tensors, config_of(name))
    assert not torch.equal(all_rows(plain), expected)
