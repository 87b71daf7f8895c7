"""Requantised weights beside a tie: float32 may take either code there, and nothing else may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_files import WEIGHT, find, write_checkpoint
from torch import Tensor

from adapter_merge.verification.requantised_weights import _compare

SCALE = 0.0123291015625  # of bfloat16; dequantised values are rounded to bfloat16, so that no tie is half way
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [8, 8]}


def compared(codes: Tensor, wanted: Tensor, folder: Path) -> bool:
    """Whether `codes`, E4M3 times SCALE, pass for the weight `wanted` (float64)."""
    scale = torch.full((1, 1), SCALE, dtype=torch.bfloat16)
    tensors = {WEIGHT: codes.to(torch.float8_e4m3fn), f"{WEIGHT}_scale_inv": scale}
    made = find(write_checkpoint(folder, tensors, CONFIG)).weights[WEIGHT]
    return _compare(made, torch.zeros(8, 8, dtype=torch.float64), wanted)[1]


@pytest.mark.parametrize("step", [1.0, -1.0])
def test_both_codes_of_a_tie_pass_and_no_other(step: float, tmp_path: Path) -> None:
    grid = torch.arange(16, 32).float()  # neighbours differ by 2 from 16 to 32
    low = grid[grid % 2 == 0].repeat(8).view(8, 8) * step
    tie = (low.double() + step) * SCALE
    for beside in (1 - 2.0**-25, 1.0, 1 + 2.0**-25):
        assert compared(low, tie * beside, tmp_path / f"a{beside}")
        assert compared(low + 2 * step, tie * beside, tmp_path / f"b{beside}")
        assert not compared(low - 2 * step, tie * beside, tmp_path / f"c{beside}")
    clear = (low.double() + 1.2 * step) * SCALE
    assert compared(low + 2 * step, clear, tmp_path / "d")
    assert not compared(low, clear, tmp_path / "e")
    mixed = low.clone()
    mixed[0, 0] += 2 * step
    assert not compared(mixed, (low.double() + 0.8 * step) * SCALE, tmp_path / "f")
