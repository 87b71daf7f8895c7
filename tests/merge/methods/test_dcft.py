"""DCFT's exact factors against conv_transpose2d in float64; the form's row blocks against whole matrices."""

from __future__ import annotations

import pytest
import torch

from adapter_merge.errors import NumericsError
from adapter_merge.methods.canonical_form import CanonicalForm, Residual
from adapter_merge.methods.dcft import dcft_factors, infer_stride


def dense(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, stride: tuple[int, int], scale: float) -> torch.Tensor:
    """dW (out, in), float64, by the paper's formula."""
    image = a.double().T @ b.double().T
    spread = torch.nn.functional.conv_transpose2d(image[None, None], c.double()[None, None], stride=stride)
    return spread[0, 0].T * scale


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("size", [2, 4, 8, 12, 16])
def test_factors_are_exact_in_float32(size: int, rank: int) -> None:
    torch.manual_seed(size * 10 + rank)
    a, b, c = torch.randn(rank, 24), torch.randn(11, rank), torch.randn(size, size)  # in = 24 k, out = 11 k
    want = dense(a, b, c, (size, size), 32 / (4 + 1e-5))
    up, down = dcft_factors(a, b, c, (size, size), 32 / (4 + 1e-5))
    assert up.shape == (11 * size, rank * size) and down.shape == (rank * size, 24 * size)
    got = up.float() @ down.float()
    assert float((got - want).norm() / want.norm()) <= 1e-6


@pytest.mark.parametrize(("kernel", "stride"), [((4, 6), (4, 6)), ((4, 6), (3, 5)), ((3, 3), (1, 2)), ((2, 8), (5, 9))])
def test_any_kernel_and_stride(kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(2, 9), torch.randn(7, 2), torch.randn(kernel)
    want = dense(a, b, c, stride, 0.7)
    up, down = dcft_factors(a, b, c, stride, 0.7)
    assert up.shape[1] == 2 * min(kernel)
    assert float((up.float() @ down.float() - want).norm() / want.norm()) <= 1e-6
    out, inner = want.shape
    assert (infer_stride(inner, 9, kernel[0]), infer_stride(out, 7, kernel[1])) == stride


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_kernels_are_exact_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(2, 9).to(dtype), torch.randn(7, 2).to(dtype), torch.randn(16, 16).to(dtype)
    want = dense(a, b, c, (16, 16), 1.0)
    up, down = dcft_factors(a, b, c, (16, 16), 1.0)
    assert float((up.float() @ down.float() - want).norm() / want.norm()) <= 1e-6


def test_a_kernel_of_rank_three_gives_rank_three() -> None:
    torch.manual_seed(0)
    c = torch.randn(8, 3) @ torch.randn(3, 8)
    a, b = torch.randn(1, 5), torch.randn(6, 1)
    up, down = dcft_factors(a, b, c, (8, 8), 1.0)
    assert down.shape[0] == 3
    want = dense(a, b, c, (8, 8), 1.0)
    assert float((up @ down - want).norm() / want.norm()) <= 1e-6


@pytest.mark.parametrize(("size", "steps", "kernel"), [(10, 4, 2), (7, 3, 2), (9, 1, 8), (4, 8, 4)])
def test_no_stride_is_found_where_there_is_none(size: int, steps: int, kernel: int) -> None:
    assert infer_stride(size, steps, kernel) is None


FORMS = ("plain", "rows", "columns", "both", "magnitude", "column magnitude", "residual", "residual magnitude")


def make_form(kind: str, dtype: torch.dtype = torch.float64) -> CanonicalForm:
    torch.manual_seed(3)
    up, down = torch.randn(12, 3, dtype=dtype), torch.randn(3, 10, dtype=dtype)
    rows, columns = torch.rand(12, dtype=dtype) + 0.5, torch.rand(10, dtype=dtype) + 0.5
    residual = None
    if "residual" in kind:
        residual = Residual(torch.randn(12, 2, dtype=dtype), torch.randn(2, 10, dtype=dtype), torch.bfloat16)
    return CanonicalForm(
        up,
        down,
        row_scale=rows if kind in ("rows", "both") else None,
        col_scale=columns if kind in ("columns", "both") else None,
        magnitude=(columns if kind == "column magnitude" else rows) if "magnitude" in kind else None,
        magnitude_dim=1 if kind == "column magnitude" else 0,
        residual=residual,
    )


def whole(form: CanonicalForm, weight: torch.Tensor) -> torch.Tensor:
    """W' written out, without blocks."""
    if form.residual is not None:
        weight = (weight - form.residual.up @ form.residual.down).to(form.residual.dtype).to(weight.dtype)
    after = weight + form.up @ form.down
    if form.magnitude is not None:
        other = 1 - form.magnitude_dim
        norm = after.pow(2).sum(other, keepdim=True).sqrt()
        after = after / norm * form.magnitude.unsqueeze(other)
    if form.row_scale is not None:
        after = form.row_scale[:, None] * after
    return after if form.col_scale is None else after * form.col_scale


@pytest.mark.parametrize("kind", FORMS)
def test_blocks_of_rows_equal_the_whole(kind: str) -> None:
    form = make_form(kind)
    weight = torch.randn(12, 10, dtype=torch.float64)
    want = whole(form, weight)
    torch.testing.assert_close(form.merged(weight), want)
    torch.testing.assert_close(form.delta(weight), want - weight)
    bound = form.bound_to(weight) if form.needs_pass else form
    pieces = []
    for start in range(0, 12, 5):
        block = weight[start : start + 5].clone()
        bound.apply_(block, start)
        pieces.append(block)
        torch.testing.assert_close(
            bound.delta_rows(weight[start : start + 5], start), want[start : start + 5] - weight[start : start + 5]
        )
    torch.testing.assert_close(torch.cat(pieces), want)
    torch.testing.assert_close(form.transposed().merged(weight.T.contiguous()), want.T)


def test_a_direction_of_zero_is_refused_or_becomes_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device would have to be waited for, the row becomes NaN, which is refused when it is written."""
    form = make_form("magnitude")
    weight = torch.randn(12, 10, dtype=torch.float64)
    form.up[4], weight[4] = 0, 0
    with pytest.raises(NumericsError, match="row 4"):
        form.merged(weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    after = form.merged(weight)
    assert bool(after[4].isnan().all()) and bool(torch.isfinite(after[[i for i in range(12) if i != 4]]).all())
    assert form.magnitude is not None
    form.magnitude[4] = 0
    assert bool((form.merged(weight)[4] == 0).all()), "a row of nothing with a magnitude of nothing stays"
