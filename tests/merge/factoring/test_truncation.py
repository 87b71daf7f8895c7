"""Truncation against a float64 SVD: the dense, the factored and the randomised route, and the edges of an energy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapter_merge.errors import InputError
from adapter_merge.factoring.delta_operator import DeltaOperator
from adapter_merge.factoring.randomised_svd import generator, randomised_spectrum, spectral_norm
from adapter_merge.factoring.rank_choice import allot_ranks, bytes_of, rank_for_energy
from adapter_merge.factoring.truncated_svd import (
    core_svd,
    dense_spectrum,
    kronecker_spectrum,
    low_rank_spectrum,
    numerical_rank,
    product_norms,
    truncate,
)
from adapter_merge.methods.canonical_form import CanonicalForm, Residual

CPU = torch.device("cpu")


class Rows:
    """W0 in memory, in blocks of seven rows, as the operator takes it."""

    resident = True

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape, self.device = weight, tuple(weight.shape), CPU

    def blocks(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.weight.shape[0], 7):
            yield start, self.weight[start : start + 7].to(dtype)


def scaled_form(out: int, inner: int, rank: int, noise: float, residual: torch.dtype | None = None) -> CanonicalForm:
    up = 0.1 * torch.randn(out, rank, dtype=torch.float64)
    down = 0.1 * torch.randn(rank, inner, dtype=torch.float64)
    magnitude = 1 + noise * torch.randn(out, dtype=torch.float64)
    extra = None
    if residual is not None:
        extra = Residual(0.2 * torch.randn(out, 2).double(), 0.2 * torch.randn(2, inner).double(), residual)
    return CanonicalForm(up, down, magnitude=magnitude, residual=extra)


def optimum(delta: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(delta)[rank:].square().sum().sqrt())


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
def test_the_operator_is_the_delta(residual: torch.dtype | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 50) / 50**0.5
    form = scaled_form(30, 50, 4, 0.02, residual)
    delta = form.delta(weight.double())
    operator = DeltaOperator(form, Rows(weight))  # type: ignore[arg-type]
    x, y = torch.randn(50, 3), torch.randn(30, 3)
    assert torch.allclose(operator.matmul(x).double(), delta @ x.double(), atol=1e-5)
    assert torch.allclose(operator.rmatmul(y).double(), delta.T @ y.double(), atol=1e-5)
    assert operator.total == pytest.approx(float(delta.square().sum()), rel=1e-6)
    assert operator.base_total == pytest.approx(float(weight.double().square().sum()), rel=1e-12)
    exact = form.bound_to(weight.double()).row_scale
    assert operator.scale is not None and exact is not None
    assert torch.allclose(operator.scale, exact, atol=1e-6)


@pytest.mark.parametrize("shape", [(160, 300), (300, 160)])
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.05])
@pytest.mark.parametrize("rank", [1, 4, 12, 30])
def test_the_randomised_route_is_within_one_percent_of_the_best(
    shape: tuple[int, int], noise: float, rank: int
) -> None:
    torch.manual_seed(3)
    weight = torch.randn(shape) / shape[1] ** 0.5
    form = scaled_form(*shape, 8, noise)
    delta = form.delta(weight.double())
    operator = DeltaOperator(form, Rows(weight))  # type: ignore[arg-type]
    spectrum = randomised_spectrum(operator, operator.total, rank, generator("a", CPU))
    up, down = spectrum.factors(rank)
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
    error = float(torch.linalg.vector_norm(delta - up @ down))
    assert optimum(delta, rank) * (1 - 1e-6) <= error <= 1.01 * optimum(delta, rank)


def test_a_slowly_falling_spectrum_is_followed_too() -> None:
    torch.manual_seed(4)
    u, _ = torch.linalg.qr(torch.randn(200, 200).double())
    v, _ = torch.linalg.qr(torch.randn(260, 200).double())
    weight = (u * torch.arange(1, 201).double().rsqrt()) @ v.T
    form = CanonicalForm(
        torch.zeros(200, 1).double(), torch.zeros(1, 260).double(), row_scale=torch.full((200,), 1.5).double()
    )
    operator = DeltaOperator(form, Rows(weight.float()))  # type: ignore[arg-type]
    spectrum = randomised_spectrum(operator, operator.total, 20, generator("b", CPU))
    up, down = spectrum.factors(20)
    assert float(torch.linalg.vector_norm(0.5 * weight - up @ down)) <= 1.01 * optimum(0.5 * weight, 20)


def test_the_randomised_route_repeats_its_bits_and_differs_by_name() -> None:
    torch.manual_seed(5)
    weight = torch.randn(64, 80) / 9
    form = scaled_form(64, 80, 4, 0.05)
    operator = DeltaOperator(form, Rows(weight))  # type: ignore[arg-type]
    one, two, other = (
        randomised_spectrum(operator, operator.total, 6, generator(name, CPU)).left for name in ("a", "a", "b")
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_dense_and_cores_are_the_svd(shape: tuple[int, int]) -> None:
    torch.manual_seed(6)
    up, down = torch.randn(shape[0], 9).double(), torch.randn(9, shape[1]).double()
    values = torch.linalg.svdvals(up @ down)[:9]
    for spectrum in (dense_spectrum(up @ down), low_rank_spectrum(up, down)):
        assert torch.allclose(spectrum.squares[:9].sqrt(), values, rtol=1e-6)
        for rank in (1, 5, 9):
            left, right = spectrum.factors(rank)
            error = float(torch.linalg.vector_norm(up @ down - left @ right))
            assert error == pytest.approx(optimum(up @ down, rank), rel=1e-6, abs=1e-9)
    left, s, right = core_svd(up, down)
    assert torch.allclose((left * s) @ right, up @ down)
    frobenius, spectral = product_norms(up, down)
    assert frobenius == pytest.approx(float(torch.linalg.matrix_norm(up @ down)))
    assert spectral == pytest.approx(float(values[0]))


@pytest.mark.parametrize("sizes", [(3, 4, 10, 7), (4, 3, 6, 12)])
def test_a_kronecker_product_has_the_svd_of_its_sides(sizes: tuple[int, int, int, int]) -> None:
    torch.manual_seed(10)
    first, second = torch.randn(sizes[0], sizes[1]).double(), torch.randn(sizes[2], sizes[3]).double()
    first[-1] = first[0]  # a zero value
    delta = torch.kron(first, second)
    values = torch.linalg.svdvals(delta)
    spectrum = kronecker_spectrum(first, second)
    assert spectrum.full and spectrum.rank == int(torch.linalg.matrix_rank(delta))
    assert torch.allclose(spectrum.squares.sqrt(), values[: spectrum.rank])
    up, down = spectrum.factors(spectrum.rank)
    assert torch.allclose(up @ down, delta)
    short = kronecker_spectrum(first, second, limit=5)
    up, down = short.factors(5)
    assert not short.full
    assert float(torch.linalg.vector_norm(delta - up @ down)) == pytest.approx(optimum(delta, 5))


@pytest.mark.parametrize("route", ["dense", "cores", "randomised"])
def test_weighting_minimises_the_error_of_the_output(route: str) -> None:
    torch.manual_seed(7)
    up, down = torch.randn(50, 12).double(), torch.randn(12, 60).double()
    root = torch.randn(60, 60).double() * torch.linspace(3, 0.01, 60).double()[:, None]
    delta = up @ down
    if route == "dense":
        spectrum = dense_spectrum(delta, root)
    elif route == "cores":
        spectrum = low_rank_spectrum(up, down, root)
    else:
        operator = DeltaOperator(CanonicalForm(up, down), Rows(torch.zeros(50, 60)))  # type: ignore[arg-type]
        total = float((delta @ root).square().sum())
        spectrum = randomised_spectrum(operator, total, 4, generator("c", CPU), root.float())
    left, right = spectrum.factors(4)
    weighted = float(torch.linalg.vector_norm((delta - left @ right) @ root))
    assert weighted == pytest.approx(optimum(delta @ root, 4), rel=1e-2)
    plain_left, plain_right = truncate(delta, 4)
    assert weighted < 0.9 * float(torch.linalg.vector_norm((delta - plain_left @ plain_right) @ root))


@pytest.mark.parametrize("energy", [1 - 2**-24, 1 - 2**-53, 0.999999])
def test_an_energy_next_to_one_takes_what_there_is_and_no_more(energy: float) -> None:
    squares = torch.cat((torch.rand(64).double().sort(descending=True).values, torch.zeros(36).double()))
    rank = rank_for_energy(squares, energy)
    assert 1 <= rank <= 64
    assert float(squares[rank:].sum()) <= (1 - energy) * float(squares.sum())
    single = rank_for_energy(squares.to(torch.float32), energy)
    assert 1 <= single <= 64


def test_a_small_value_of_a_large_weight_is_kept() -> None:
    torch.manual_seed(11)
    q, _ = torch.linalg.qr(torch.randn(11_008, 4).double())
    p, _ = torch.linalg.qr(torch.randn(4_096, 4).double())
    values = torch.tensor([1.0, 0.5, 1e-3, 1e-9]).double()  # the last is below what float32 files hold
    assert numerical_rank(core_svd(q * values, p.T.contiguous())[1]) == 3


def test_energy_of_nothing_is_rank_one() -> None:
    assert rank_for_energy(torch.zeros(5), 0.99) == 1
    up, down = truncate(torch.zeros(4, 6), 0.99)
    assert up.shape == (4, 1) and not (up @ down).any()
    assert numerical_rank(core_svd(torch.zeros(4, 2).double(), torch.zeros(2, 6).double())[1]) == 1


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=60)
def test_the_rank_for_an_energy_is_the_smallest(values: list[float], energy: float) -> None:
    squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_for_energy(squares, energy)
    total = math.fsum(values)
    if total > 0:
        assert math.fsum(squares[rank:].tolist()) <= (1 - energy) * total * (1 + 1e-9)
        if rank > 1:
            assert math.fsum(squares[rank - 1 :].tolist()) > (1 - energy) * total * (1 - 1e-9)


def test_the_spectral_norm_is_found() -> None:
    torch.manual_seed(8)
    delta = torch.randn(60, 90)
    operator = DeltaOperator(
        CanonicalForm(delta.double(), torch.eye(90).double()),
        Rows(torch.zeros(60, 90)),  # type: ignore[arg-type]
    )
    found = spectral_norm(operator, generator("d", CPU))
    exact = float(torch.linalg.matrix_norm(delta, 2))
    assert 0.99 * exact <= found <= exact * (1 + 1e-5)


def best_allotment(squares: list[Tensor], shapes: list[tuple[int, int]], budget: int) -> float:
    """The smallest error that any allotment reaches, by trying all."""
    from itertools import product

    best = math.inf
    for ranks in product(*(range(1, square.numel() + 1) for square in squares)):
        if sum(bytes_of(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)) <= budget:
            best = min(best, sum(float(s[r:].sum()) for s, r in zip(squares, ranks, strict=True)))
    return best


def test_a_budget_goes_where_it_buys_most() -> None:
    torch.manual_seed(9)
    shapes = [(10, 20), (20, 10), (15, 15)]  # equal prices: greedy is optimal
    squares = [torch.rand(5).double().sort(descending=True).values * scale for scale in (1, 10, 0.1)]
    for budget in (3 * 120, 5 * 120, 8 * 120, 11 * 120):
        ranks = allot_ranks(squares, shapes, budget)
        assert sum(bytes_of(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)) <= budget
        error = sum(float(s[r:].sum()) for s, r in zip(squares, ranks, strict=True))
        assert error == pytest.approx(best_allotment(squares, shapes, budget))
    with pytest.raises(InputError, match="budget is too small"):
        allot_ranks(squares, shapes, 300)
