"""bitsandbytes' nf4, fp4 and int8: packed by bitsandbytes on the CPU, dequantised as bitsandbytes does, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from packed_files import LINEAR, WEIGHT, all_rows, find, retention, write_checkpoint, write_packed
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.quantisation.schemes.bitsandbytes import CODES

CONFIG = {"quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True,
          "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
          "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
          "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
          "llm_int8_enable_fp32_cpu_offload": False}  # fmt: skip


def packed(weight: Tensor, kind: str = "nf4", **settings: Any) -> dict[str, Tensor]:
    """The tensors of one Linear4bit, as its state_dict names them."""
    codes, state = functional.quantize_4bit(weight, quant_type=kind, **settings)
    return {WEIGHT: codes} | {f"{WEIGHT}.{key}": part for key, part in state.as_dict(packed=True).items()}


def unpacked(tensors: dict[str, Tensor], *, kernel: bool) -> Tensor:
    """bitsandbytes' own dequantisation: its CPU kernel, or its default backend in torch."""
    stats = {key.removeprefix(f"{WEIGHT}."): part for key, part in tensors.items() if key.startswith(f"{WEIGHT}.")}
    state = functional.QuantState.from_dict(dict(stats), torch.device("cpu"))
    if kernel:
        weight: Tensor = functional.dequantize_4bit(tensors[WEIGHT], state)
        return weight
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    eager = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)  # not compiled
    raw = tensors[WEIGHT].view(torch.uint8).reshape(-1)
    result: Tensor = eager(raw, absmax, state.code, state.blocksize, state.shape, state.dtype)
    return result


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_are_the_librarys(kind: str, double: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where in_features is a multiple of the block, the CPU kernel and the default backend agree, and the rows here."""
    tensors = packed(weight_of(96, 192, dtype), kind, blocksize=64, compress_statistics=double)
    folder = write_checkpoint(tmp_path, tensors, CONFIG | {"bnb_4bit_quant_type": kind})
    for kernel in (True, False):
        expected = unpacked(tensors, kernel=kernel)
        for step in (0, 7):
            rows = all_rows(folder, step=step)
            assert rows.dtype == expected.dtype == dtype
            assert torch.equal(rows, expected), (kernel, step)
    assert find(folder).side == set(tensors) - {WEIGHT}


@pytest.mark.parametrize(("rows", "columns", "block"), [(64, 96, 64), (33, 50, 32), (5, 7, 64), (48, 48, 4096)])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_blocks_across_rows(rows: int, columns: int, block: int, double: bool, tmp_path: Path) -> None:
    """Blocks run through the flattened weight. The CPU kernel restarts them in each row: codes times absmax decide."""
    tensors = packed(weight_of(rows, columns), blocksize=block, compress_statistics=double)
    folder = write_checkpoint(tmp_path, tensors, CONFIG)
    raw = tensors[WEIGHT].reshape(-1).long()
    codes = torch.stack((raw >> 4, raw & 15), -1).reshape(-1)[: rows * columns]
    absmax = tensors[f"{WEIGHT}.absmax"]
    if double:
        state = json.loads(bytes(tensors[f"{WEIGHT}.quant_state.bitsandbytes__nf4"].tolist()))
        inner = tensors[f"{WEIGHT}.nested_quant_map"][absmax.long()]
        nested = tensors[f"{WEIGHT}.nested_absmax"].repeat_interleave(256)[: absmax.numel()]
        absmax = inner * nested + torch.tensor(state["nested_offset"], dtype=torch.float32)
    spread = absmax.repeat_interleave(block)[: rows * columns]
    expected = (functional.get_4bit_type("nf4", "cpu")[codes] * spread).to(torch.bfloat16).view(rows, columns)
    for step in (0, 3):
        assert torch.equal(all_rows(folder, step=step), expected)
    assert torch.equal(unpacked(tensors, kernel=False), expected)


def test_tables_are_the_librarys() -> None:
    for kind, values in CODES.items():
        assert torch.equal(torch.tensor(values), functional.get_4bit_type(kind, "cpu"))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_storage_dtypes(storage: torch.dtype, tmp_path: Path) -> None:
    """bnb_4bit_quant_storage changes the dtype of the packed bytes, and nothing else."""
    tensors = packed(weight_of(64, 128), quant_storage=storage)
    assert tensors[WEIGHT].dtype == storage
    folder = write_checkpoint(tmp_path / "base", tensors, CONFIG)
    expected = unpacked(tensors, kernel=True)
    assert torch.equal(all_rows(folder, step=5), expected)
    out = load_file(write_packed(folder, tmp_path / "out", WEIGHT, expected.float()) / "model.safetensors")
    assert torch.equal(unpacked(out, kernel=True), expected)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_requantised(kind: str, double: bool, tmp_path: Path) -> None:
    tensors = packed(weight_of(96, 128), kind, compress_statistics=double)
    folder = write_checkpoint(tmp_path / "base", tensors, CONFIG)
    stored = unpacked(tensors, kernel=True).float()
    wanted = stored + torch.outer(torch.randn(96), torch.randn(128)) * 0.3 * stored.std()
    out = load_file(write_packed(folder, tmp_path / "out", WEIGHT, wanted) / "model.safetensors")
    again = unpacked(out, kernel=True).float()
    assert retention(again, stored, wanted) == pytest.approx(1, abs=0.1)
    fresh = unpacked(packed(wanted.to(torch.bfloat16), kind, compress_statistics=double), kernel=True).float()
    assert float((again - wanted).norm()) < 1.1 * float((fresh - wanted).norm())


def int8_of(weight: Tensor) -> dict[str, Tensor]:
    codes, scale, _ = functional.int8_vectorwise_quant(weight.clone())
    return {WEIGHT: codes, f"{LINEAR}.SCB": scale, f"{LINEAR}.weight_format": torch.tensor(0, dtype=torch.uint8)}


def test_int8(tmp_path: Path) -> None:
    tensors = int8_of(weight_of(40, 56, torch.float16))
    folder = write_checkpoint(tmp_path, tensors, CONFIG | {"load_in_8bit": True, "load_in_4bit": False})
    expected = functional.int8_vectorwise_dequant(tensors[WEIGHT], tensors[f"{LINEAR}.SCB"])
    assert torch.equal(all_rows(folder, step=9), expected)
    assert find(folder).side == set(tensors) - {WEIGHT}
