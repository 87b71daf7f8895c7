"""Weights as bitsandbytes quantises them on loading: its own quantise and dequantise functions are the oracle."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file
from torch import Tensor

from adapter_merge.errors import InputError
from adapter_merge.quantisation.simulated_4bit import SimulatedWeight, dynamic_map, parse_trained_on
from adapter_merge.quantisation.transposed_cache import TransposedCache
from adapter_merge.storage.safetensors_header import read_header
from adapter_merge.storage.tensor_io import read_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def nested(absmax: Tensor) -> Tensor:
    """absmax after double quantisation: the nearest of the map's values, in blocks of 256.

    bitsandbytes' default backend and CUDA do the same; its kernel for CPUs misses the nearest in one of a thousand.
    """
    around, table = absmax - absmax.mean(), bnb.create_dynamic_map()
    made = []
    for values in around.split(256):
        largest = values.abs().max()
        nearest = (values[:, None] / largest - table).abs().argmin(dim=1)
        made.append(table[nearest] * largest)
    return torch.cat(made) + absmax.mean()


def round_trip(weight: Tensor, kind: str, double: bool, block: int) -> Tensor:
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
    absmax = state.absmax
    if double:
        absmax = nested(bnb.quantize_4bit(weight, blocksize=block, quant_type=kind)[1].absmax)
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert float((absmax != theirs).float().mean()) < 0.02  # and then it is the second nearest code
        assert torch.allclose(absmax, theirs, rtol=0.02)
    # Not dequantize_4bit: on a CPU it is not the layout's where in_features is no multiple of the block.
    made: Tensor = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, block, weight.shape, weight.dtype)
    return made


@pytest.mark.parametrize("stated", ["nf4", "nf4-double", "fp4", "fp4-double", "nf4-double,block=128"])
@pytest.mark.parametrize("shape", [(128, 256), (64, 96), (7, 100)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_bitsandbytes_round_trip(stated: str, shape: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(DTYPES[dtype])
    weight[0] = 0  # blocks without a largest value
    save_file({"w": weight}, tmp_path / "w.safetensors")
    settings = parse_trained_on(stated)
    assert settings is not None
    (ref,) = read_header(tmp_path / "w.safetensors").tensors
    got = read_tensor(SimulatedWeight(ref, settings, TransposedCache()).as_ref())
    assert got.dtype == weight.dtype
    assert torch.equal(got, round_trip(weight, settings.kind, settings.double, settings.block))


def test_rows_are_those_of_the_whole_weight(tmp_path: Path) -> None:
    weight = torch.randn(33, 40)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    settings = parse_trained_on("nf4-double,dtype=bfloat16")
    assert settings is not None
    (ref,) = read_header(tmp_path / "w.safetensors").tensors
    made = SimulatedWeight(ref, settings, TransposedCache())
    whole = read_tensor(made.as_ref())
    assert torch.equal(whole, round_trip(weight.bfloat16(), "nf4", True, 64))

    def read(part: object, first: int, stop: int) -> Tensor:
        return weight.view(-1).view(torch.uint8)[first:stop]

    for first, count in ((0, 1), (3, 7), (32, 1), (0, 33)):
        assert torch.equal(made.rows(read, first, count), whole[first : first + count])


def test_the_dynamic_map_is_bitsandbytes() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "nf4-triple",
        "nf4,block=63",
        "nf4,dtype=int8",
        "original,block=64",
        "nf4,x=1",
        "nf4,block=64,block=32",
        "",
    ],
)
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--trained-on"):
        parse_trained_on(text)
    assert parse_trained_on("original") is None
