"""AWQ: dequantised as compressed-tensors' converter and compressor do, bit for bit.

AutoAWQ stopped at 0.2.9 and packs on a GPU. The test packs integers word by word in AutoAWQ's order; what they mean is
compressed-tensors' word.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from packed_files import LINEAR, all_rows, find, write_checkpoint
from torch import Tensor

IN, OUT = 96, 64
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map: the output in each place of a word


def words(codes: Tensor) -> Tensor:
    packed = torch.empty(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            word = sum(int(codes[row, 8 * column + output]) << (4 * place) for place, output in enumerate(ORDER))
            packed[row, column] = word - 2**32 if word >= 2**31 else word
    return packed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [32, 96])
def test_rows_are_the_librarys(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 16, (IN, OUT), generator=generator)
    zeros = torch.randint(0, 16, (IN // size, OUT), generator=generator)
    scales = (torch.rand(IN // size, OUT, generator=generator) * 0.1).to(dtype)
    tensors = {f"{LINEAR}.qweight": words(codes), f"{LINEAR}.qzeros": words(zeros), f"{LINEAR}.scales": scales}
    converter = AutoAWQConverter(group_size=size, ignore=())
    converted = {name.removeprefix(f"{LINEAR}."): part for name, part in converter.process(dict(tensors)).items()}
    (scheme,) = converter._build_quant_config().config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    expected = compressor.decompress(converted, scheme)["weight"]
    exact = ((codes - zeros.repeat_interleave(size, 0)).double() * scales.double().repeat_interleave(size, 0)).T
    assert torch.equal(expected, exact.float().to(dtype))  # the oracle itself against the layout
    quantization = {"quant_method": "awq", "bits": 4, "group_size": size if size < IN else -1, "zero_point": True,
                    "version": "gemm", "modules_to_not_convert": None}  # fmt: skip
    folder = write_checkpoint(tmp_path, tensors, quantization)
    for step in (0, 7):
        rows = all_rows(folder, step=step)
        assert rows.dtype == dtype
        assert torch.equal(rows, expected)
    assert find(folder).side == set(tensors)
