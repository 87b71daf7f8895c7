"""GPTQ: codes packed here word by word from the published layout, in every combination of bits, groups and versions.

The expected values are (code - zero) * scale in float64, rounded once. test_gptqmodel.py has checkpoints that
GPTQModel made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_files import LINEAR, WEIGHT, all_rows, find, read, write_checkpoint
from torch import Tensor

from adapter_merge.errors import FileFormatError, UnsupportedError

IN, OUT = 96, 64


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (n, m) along the first dimension into int32 (n bits / 32, m), with Python's integers."""
    per_word = 32 // bits
    packed = torch.empty(codes.shape[0] // per_word, codes.shape[1], dtype=torch.int32)
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            word = sum(int(codes[row * per_word + place, column]) << (bits * place) for place in range(per_word))
            packed[row, column] = word - 2**32 if word >= 2**31 else word
    return packed


def checkpoint(bits: int, groups: Tensor, version: int, dtype: torch.dtype = torch.float16) -> tuple[Any, Tensor]:
    """Return the tensors of one layer and its exact dense weight (out, in), float64."""
    generator = torch.Generator().manual_seed(bits)
    count = int(groups.max()) + 1
    codes = torch.randint(0, 2**bits, (IN, OUT), generator=generator)
    zeros = torch.randint(1, 2**bits, (count, OUT), generator=generator)
    scales = (torch.rand(count, OUT, generator=generator) * 0.1).to(dtype)
    tensors = {
        f"{LINEAR}.qweight": words(codes, bits),
        f"{LINEAR}.qzeros": words((zeros - (2 - version)).T, bits).T.contiguous(),
        f"{LINEAR}.scales": scales,
        f"{LINEAR}.g_idx": groups.to(torch.int32),
    }
    dense = (codes - zeros[groups]).double() * scales.double()[groups]
    return tensors, dense.T


def config(bits: int, size: int, version: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": False,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.01, **changes}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows(bits: int, size: int, version: int, dtype: torch.dtype, tmp_path: Path) -> None:
    groups = torch.arange(IN) // (IN if size == -1 else size)
    tensors, dense = checkpoint(bits, groups, version, dtype)
    folder = write_checkpoint(tmp_path, tensors, config(bits, size, version))
    for step in (0, 7):
        rows = all_rows(folder, step=step)
        assert rows.dtype == dtype
        assert torch.equal(rows, dense.float().to(dtype))  # the product has 19 bits at most: exact in float32
    assert find(folder).side == set(tensors)


def test_activation_order(tmp_path: Path) -> None:
    """desc_act: g_idx in any order, and groups of any size."""
    groups = torch.randint(0, 3, (IN,), generator=torch.Generator().manual_seed(0))
    groups[:3] = torch.arange(3)
    tensors, dense = checkpoint(4, groups, 1)
    folder = write_checkpoint(tmp_path, tensors, config(4, 32, 1, desc_act=True))
    assert torch.equal(all_rows(folder, step=10), dense.half())


def test_without_group_index(tmp_path: Path) -> None:
    tensors, dense = checkpoint(4, torch.arange(IN) // 32, 1)
    del tensors[f"{LINEAR}.g_idx"]
    assert torch.equal(all_rows(write_checkpoint(tmp_path, tensors, config(4, 32, 1))), dense.half())


def test_settings_per_module(tmp_path: Path) -> None:
    """GPTQModel's dynamic gives a module other bits and another group size: they follow from its tensors."""
    tensors, dense = checkpoint(8, torch.arange(IN) // 48, 1)
    dynamic = {"+:.*q_proj": {"bits": 8, "group_size": 48}}
    folder = write_checkpoint(tmp_path, tensors, config(4, 32, 1, dynamic=dynamic))
    assert torch.equal(all_rows(folder), dense.half())


def test_groups_outside(tmp_path: Path) -> None:
    tensors, _ = checkpoint(4, torch.arange(IN) // 32, 1)
    tensors[f"{LINEAR}.g_idx"][5] = 3
    folder = write_checkpoint(tmp_path, tensors, config(4, 32, 1))
    with pytest.raises(FileFormatError, match="contains groups that have no scale"):
        all_rows(folder)


def test_two_formats(tmp_path: Path) -> None:
    tensors, _ = checkpoint(4, torch.arange(IN) // 32, 1)
    folder = write_checkpoint(tmp_path, tensors, config(4, 32, 1, format="gptq_v2"))
    with pytest.raises(UnsupportedError, match="unsupported value of format"):
        find(folder)


def test_not_requantised(tmp_path: Path) -> None:
    tensors, dense = checkpoint(4, torch.arange(IN) // 32, 1)
    weight = find(write_checkpoint(tmp_path, tensors, config(4, 32, 1))).weights[WEIGHT]
    with pytest.raises(UnsupportedError, match="not quantised again"):
        weight.pack(dense.float(), read)
