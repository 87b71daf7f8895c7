"""Rounding by drawn numbers: the two neighbours, in the mean the value, the same again for the same name."""

from __future__ import annotations

import pytest
import torch

from adapter_merge.quantisation.rounding import round_to_integers, round_to_table, uniform_numbers
from adapter_merge.quantisation.stored_codes import decode_pairs, encode_e2m1, encode_e4m3, pack_low_first

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@pytest.mark.parametrize("value", [-447.0, -6.0, -1.3, -0.004, 0.0, 0.0011, 0.3, 2.2, 5.9, 17.0, 400.0])
def test_neighbours_and_mean_of_e4m3(value: float) -> None:
    uniform = uniform_numbers("weight", (100_000,))
    rounded = encode_e4m3(torch.full((100_000,), value), uniform).float()
    found = rounded.unique()
    assert found.numel() <= 2
    low, high = float(found.min()), float(found.max())
    assert low <= value <= high
    between = torch.tensor([low + (high - low) * step / 8 for step in range(9)]).to(torch.float8_e4m3fn).float()
    assert set(between.tolist()) <= {low, high}  # no other code lies between
    assert float(rounded.double().mean()) == pytest.approx(value, abs=0.01 * (high - low) + 1e-12)


@pytest.mark.parametrize("value", [-9.0, -5.0, -0.1, 0.0, 0.2, 0.75, 1.25, 2.9, 6.0])
def test_neighbours_and_mean_of_e2m1(value: float) -> None:
    codes = encode_e2m1(torch.full((1000, 100), value), uniform_numbers("weight", (1000, 100)))
    rounded = decode_pairs(pack_low_first(codes), E2M1, torch.float32, high_first=False)
    inside = max(-6.0, min(6.0, value))
    assert rounded.unique().numel() <= 2
    assert float(rounded.double().mean()) == pytest.approx(inside, abs=0.02)


def test_integers_and_tables() -> None:
    uniform = torch.tensor([0.0, 0.29, 0.31, 0.999])
    assert round_to_integers(torch.full((4,), 2.7), uniform).tolist() == [2, 2, 3, 3]
    assert round_to_integers(torch.full((4,), -2.7), uniform).tolist() == [-3, -3, -3, -2]
    assert round_to_integers(torch.tensor([0.5, 1.5, -2.6]), None).tolist() == [0, 2, -3]
    table = torch.tensor([-1.0, 0.0, 4.0])
    values = torch.tensor([-3.0, 9.0, 4.0, -1.0, 1.0, 1.0])
    assert round_to_table(values, table, torch.tensor([0.9, 0.9, 0.9, 0.0, 0.2, 0.3])).tolist() == [0, 2, 2, 0, 2, 1]


def test_draws_can_be_repeated() -> None:
    assert torch.equal(uniform_numbers("a", (3, 4)), uniform_numbers("a", (3, 4)))
    assert not torch.equal(uniform_numbers("a", (3, 4)), uniform_numbers("b", (3, 4)))
    assert float(uniform_numbers("a", (1000,)).min()) >= 0 and float(uniform_numbers("a", (1000,)).max()) < 1
