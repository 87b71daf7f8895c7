"""Properties that hold for every shape, rank, dtype and method, looked for by hypothesis."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, FactorOptions, MergeOptions
from adapter_merge.combine.delta_ops import METHODS, Settings, WeightedEdit, combine_edits, combine_forms
from adapter_merge.combine.recipe import IN_TURN, Ingredient, make_recipe
from adapter_merge.formats.peft.patterns import Pattern, pattern_fault
from adapter_merge.methods.block_edits import RowRange, RowsReplaced, apply_edit, chain_edits
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.verification.combination_definition import defined_delta

SIZES = st.integers(2, 24)
RANKS = st.integers(1, 5)
SEEDS = st.integers(0, 1 << 30)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
QUICK = settings(max_examples=25, deadline=None)
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def form_of(out: int, inner: int, rank: int, kind: str, weight: Tensor) -> CanonicalForm:
    up, down = torch.randn(out, rank, dtype=weight.dtype), torch.randn(rank, inner, dtype=weight.dtype)
    if kind == "rows":
        return CanonicalForm(up, down, magnitude=weight.norm(dim=1) * (0.5 + torch.rand(out)))
    if kind == "columns":
        return CanonicalForm(up, down, magnitude=weight.norm(dim=0) * (0.5 + torch.rand(inner)), magnitude_dim=1)
    return CanonicalForm(up, down)


WEIGHTED = st.tuples(RANKS, st.sampled_from(["plain", "rows"]), st.floats(-2, 2))
KINDS = st.sampled_from(["plain", "rows", "columns"])


@QUICK
@given(SIZES, SIZES, RANKS, KINDS, st.integers(1, 7), SEEDS)
def test_blocks_give_what_the_whole_gives(out: int, inner: int, rank: int, kind: str, step: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(out, inner, dtype=torch.float64)
    form = form_of(out, inner, rank, kind, weight)
    edit: Any = form
    while edit.needs_pass:
        parts = [edit.pass_sums(weight[i : i + step].clone(), i) for i in range(0, out, step)]
        edit = edit.with_pass_sums(sum(parts[1:], parts[0]))
    blocks = []
    for start in range(0, out, step):
        block = weight[start : start + step].clone()
        edit.apply_(block, start)
        blocks.append(block)
    torch.testing.assert_close(torch.cat(blocks), form.merged(weight))
    rows = [edit.delta_rows(weight[i : i + step], i) for i in range(0, out, step)]
    torch.testing.assert_close(torch.cat(rows), form.merged(weight) - weight)


@QUICK
@given(SIZES, SIZES, RANKS, KINDS, SEEDS)
def test_transposing_twice_is_nothing_and_once_is_the_transpose(
    out: int, inner: int, rank: int, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(out, inner, dtype=torch.float64)
    form = form_of(out, inner, rank, kind, weight)
    torch.testing.assert_close(form.transposed().merged(weight.T.contiguous()).T, form.merged(weight))
    torch.testing.assert_close(form.transposed().transposed().merged(weight), form.merged(weight))


@QUICK
@given(st.integers(1, 4), SIZES, SIZES, RANKS, SEEDS)
def test_row_ranges_are_independent(experts: int, out: int, inner: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    weights = [torch.randn(out, inner, dtype=torch.float64) for _ in range(experts)]
    forms = [form_of(out, inner, rank, "rows", weight) for weight in weights]
    stacked = chain_edits([RowRange(form, i * out, (i + 1) * out) for i, form in enumerate(forms)])
    expected = torch.stack([form.merged(weight) for form, weight in zip(forms, weights, strict=True)])
    torch.testing.assert_close(apply_edit(stacked, torch.stack(weights)), expected)


@QUICK
@given(SIZES, SIZES, st.data())
def test_replaced_rows(rows: int, columns: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    weight, values = torch.randn(rows, columns), torch.randn(len(indices), columns)
    expected = weight.clone()
    expected[indices] = values
    edit = RowsReplaced(torch.tensor(indices, dtype=torch.int64), values)
    assert torch.equal(apply_edit(edit, weight), expected)


@QUICK
@given(SIZES, SIZES, st.lists(WEIGHTED, min_size=1, max_size=4), SEEDS)
def test_linear_combination_is_the_weighted_sum_of_deltas(
    out: int, inner: int, adapters: list[tuple[int, str, float]], seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(out, inner, dtype=torch.float64)
    forms = [form_of(out, inner, rank, kind, weight) for rank, kind, _ in adapters]
    expected = weight + sum(w * form.delta(weight) for form, (_, _, w) in zip(forms, adapters, strict=True))
    parts = [WeightedEdit(form, w, 1.0, 0) for form, (_, _, w) in zip(forms, adapters, strict=True)]
    edit = combine_edits(parts, Settings())
    torch.testing.assert_close(weight if edit is None else apply_edit(edit, weight), expected)
    whole = combine_forms(forms, [w for _, _, w in adapters], weight)
    if whole.row_scale is None or float(whole.row_scale.abs().min()) > 1e-3:
        torch.testing.assert_close(whole.merged(weight), expected, atol=1e-6, rtol=1e-6)


@QUICK
@given(SIZES, SIZES, st.sampled_from(METHODS), st.floats(0.05, 1), st.permutations(range(3)), SEEDS)
def test_combinations_change_only_what_some_adapter_changes(
    out: int, inner: int, method: str, density: float, order: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(out, inner, dtype=torch.float64)
    forms = [form_of(out, inner, 2, kind, weight) for kind in ("plain", "rows", "columns")]
    for form in forms[:1]:
        form.up[0] = 0  # the first adapter leaves row 0 alone
    density = 1.0 if method == "linear" else density
    chosen = Settings(method, density, 0.05 if method == "breadcrumbs" else 0.0, seed)
    parts = [
        WeightedEdit(form, w, density, key) for key, (form, w) in enumerate(zip(forms, (0.5, 0.3, -0.2), strict=True))
    ]
    edit = combine_edits(parts, chosen)
    assert edit is not None
    after = apply_edit(edit, weight)
    assert bool(torch.isfinite(after).all())
    alone = combine_edits(parts[:1], chosen)
    assert alone is None or torch.equal(apply_edit(alone, weight)[0], weight[0])
    bound = sum(abs(p.weight) * f.delta(weight).abs() for p, f in zip(parts, forms, strict=True))
    if method in ("linear", "magnitude-prune", "breadcrumbs"):
        assert bool(((after - weight).abs() <= bound + 1e-9).all())
    shuffled = combine_edits([parts[i] for i in order], chosen)
    assert shuffled is not None
    torch.testing.assert_close(apply_edit(shuffled, weight), after)


# -- whole folders ------------------------------------------------------------------------------------------


def write_base(folder: Path, shapes: list[tuple[int, int]], dtype: torch.dtype) -> Path:
    folder.mkdir()
    tensors = {f"{name}.weight": torch.randn(*shape).to(dtype) for name, shape in zip(MODULES, shapes, strict=True)}
    save_file(tensors | {"norm.weight": torch.randn(4).to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def write_adapter(
    folder: Path, base: Path, ranks: list[int], dtype: torch.dtype, dora: bool, rslora: bool, alpha: float
) -> Path:
    folder.mkdir()
    state = load_file(base / "model.safetensors")
    tensors = {}
    for name, rank in zip(MODULES, ranks, strict=True):
        weight = state[f"{name}.weight"].float()
        tensors[f"base_model.model.{name}.lora_A.weight"] = (torch.randn(rank, weight.shape[1]) * 0.3).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (torch.randn(weight.shape[0], rank) * 0.3).to(dtype)
        if dora:
            magnitude = weight.norm(dim=1) * (1 + 0.2 * torch.rand(weight.shape[0]))
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": alpha, "use_dora": dora, "use_rslora": rslora,
              "rank_pattern": {re.escape(MODULES[1]): ranks[1]}, "target_modules": list(MODULES)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=2),
    st.lists(RANKS, min_size=2, max_size=2),
    DTYPES,
    DTYPES,
    st.booleans(),
    st.booleans(),
    st.floats(0.5, 16),
    st.sampled_from(METHODS),
    SEEDS,
)
def test_merge_delta_and_combination_agree(
    shapes: list[tuple[int, int]],
    ranks: list[int],
    dtype: torch.dtype,
    trained: torch.dtype,
    dora: bool,
    rslora: bool,
    alpha: float,
    method: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = write_base(work / "base", shapes, dtype)
        adapter = write_adapter(work / "a", base, ranks, trained, dora, rslora, alpha)
        merge(base, adapter, work / "merged", MergeOptions(device="cpu"))
        delta(base, adapter, work / "delta", DeltaOptions(device="cpu"))
        before, after = load_file(base / "model.safetensors"), load_file(work / "merged" / "model.safetensors")
        deltas = load_file(work / "delta" / "delta.safetensors")
        assert deltas.keys() == {f"{module}.weight" for module in MODULES}
        for key, change in deltas.items():  # one rounding to the base's dtype, and float32's own
            exact = before[key].double() + change.double()
            room = torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-5 * (1 + exact.abs())
            assert bool(((after[key].double() - exact).abs() <= room).all())
        assert torch.equal(before["norm.weight"], after["norm.weight"])

        def bytes_of(weights: dict[str, float]) -> bytes:
            made = make_recipe([Ingredient(n, str(adapter), w) for n, w in weights.items()], Settings(method))
            output = work / f"out{len(list(work.iterdir()))}"
            merge(base, made, output, MergeOptions(device="cpu"))
            return (output / "model.safetensors").read_bytes()

        assert bytes_of({"a": 1.0}) == (work / "merged" / "model.safetensors").read_bytes()
        assert bytes_of({"a": 0.0}) == (base / "model.safetensors").read_bytes()
        assert bytes_of({"a": 1.0, "b": 0.0}) == bytes_of({"a": 1.0})


@QUICK
@given(
    SIZES,
    SIZES,
    st.sampled_from(METHODS),
    st.floats(0.05, 1),
    st.floats(0, 0.3),
    st.lists(WEIGHTED, min_size=1, max_size=4),
    SEEDS,
)
def test_combinations_are_their_definition_in_blocks_too(
    out: int,
    inner: int,
    method: str,
    density: float,
    gamma: float,
    adapters: list[tuple[int, str, float]],
    seed: int,
) -> None:
    """combination.py (histograms, blocks, factors) against combination_definition.py (sorting, whole tensors)."""
    torch.manual_seed(seed)
    weight = torch.randn(out, inner, dtype=torch.float64)
    forms = [form_of(out, inner, rank, kind, weight) for rank, kind, _ in adapters]
    chosen = Settings(method, 1.0 if method == "linear" else density, gamma if method == "breadcrumbs" else 0.0, seed)
    weights = [w for _, _, w in adapters]
    parts = [
        WeightedEdit(form, w, chosen.density, key) for key, (form, w) in enumerate(zip(forms, weights, strict=True))
    ]
    deltas = [form.delta(weight) for form in forms]
    taken = [number for number, w in enumerate(weights) if w != 0]
    if not taken:
        assert combine_edits(parts, chosen) is None
        return
    expected, unsure = defined_delta([deltas[i] for i in taken], [parts[i] for i in taken], chosen)
    edit = combine_edits(parts, chosen)
    assert edit is not None
    got = apply_edit(edit, weight) - weight
    torch.testing.assert_close(got[~unsure], expected[~unsure], atol=1e-6, rtol=1e-6)
    # Float32 cannot order elements at a threshold: a few of each adapter, and a share of a large matrix.
    assert float(unsure.sum()) <= 0.1 * unsure.numel() + max(8, 3 * len(taken))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=2),
    st.lists(st.tuples(RANKS, RANKS, st.booleans(), st.booleans(), st.floats(-2, 2)), min_size=2, max_size=3),
    DTYPES,
    st.sampled_from(METHODS),
    st.randoms(use_true_random=False),
    SEEDS,
)
def test_several_adapters_keep_their_promises(
    shapes: list[tuple[int, int]],
    adapters: list[tuple[int, int, bool, bool, float]],
    dtype: torch.dtype,
    method: str,
    random: Any,
    seed: int,
) -> None:
    """Merge less base is delta; the order of adapters says nothing; linear factors are the linear delta."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = write_base(work / "base", shapes, dtype)
        stated = []
        for number, (one, two, dora, rslora, weight) in enumerate(adapters):
            folder = write_adapter(work / f"a{number}", base, [one, two], torch.float32, dora, rslora, 4.0)
            stated.append(Ingredient(f"a{number}", str(folder), weight))
        density = 1.0 if method == "linear" else 0.6
        made = make_recipe(stated, Settings(method, density, 0.0, seed))
        random.shuffle(stated)
        merge(base, made, work / "merged", MergeOptions(device="cpu"))
        merge(
            base,
            make_recipe(stated, Settings(method, density, 0.0, seed)),
            work / "shuffled",
            MergeOptions(device="cpu"),
        )
        merged, shuffled = (work / folder / "model.safetensors" for folder in ("merged", "shuffled"))
        assert merged.read_bytes() == shuffled.read_bytes()
        delta(base, made, work / "delta", DeltaOptions(device="cpu"))
        before, after = load_file(base / "model.safetensors"), load_file(merged)
        deltas = load_file(work / "delta" / "delta.safetensors")
        for key, weight in before.items():
            exact = weight.double() + (deltas[key].double() if key in deltas else 0)
            room = torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-5 * (1 + exact.abs())
            assert bool(((after[key].double() - exact).abs() <= room).all())
        if method != "linear" or all(weight == 0 for *_, weight in adapters):
            return
        found = factor(base, made, work / "factors", FactorOptions(device="cpu")).as_json()
        tensors = load_file(work / "factors" / "adapter_model.safetensors")
        scales = work / "factors" / "row_scale.safetensors"
        held = load_file(scales) if scales.is_file() else {}
        for key, change in deltas.items():
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            got = (
                before[key].double()
                + tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
            )
            got = got * held[f"{stem}.row_scale"].double()[:, None] if held else got
            size = float(before[key].double().norm() + change.double().norm())
            lost = float((got - before[key].double() - change.double()).norm())
            # a row whose scales cancel has no factors: the certificate says so, and must be right
            wanted = found["layers"][key.removesuffix(".weight")]["relative_error"] * float(change.double().norm())
            assert lost <= wanted + 1e-5 * size


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=2), st.lists(st.booleans(), min_size=2, max_size=3), SEEDS
)
def test_in_turn_is_one_merge_after_the_other(shapes: list[tuple[int, int]], doras: list[bool], seed: int) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        last = base = write_base(work / "base", shapes, torch.float32)
        stated = []
        for number, dora in enumerate(doras):
            folder = write_adapter(work / f"a{number}", base, [2, 3], torch.float32, dora, False, 4.0)
            stated.append(Ingredient(f"a{number}", str(folder)))
            merge(last, folder, work / f"m{number}", MergeOptions(device="cpu"))
            last = work / f"m{number}"
        merge(base, make_recipe(stated, Settings(IN_TURN)), work / "merged", MergeOptions(device="cpu"))
        one, other = (load_file(folder / "model.safetensors") for folder in (work / "merged", last))
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], atol=1e-5, rtol=1e-5)


# -- patterns ------------------------------------------------------------------------------------------------

PIECES = st.sampled_from([*"abq.\\*+?()[]|{}^$1,-", "layers", "_proj", ".*", "[0-9]+", r"\.", r"\d", "(?:", "{2,9}"])


@settings(max_examples=300, deadline=2000)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_any_accepted_pattern_matches_quickly_and_as_peft_does(key: str) -> None:
    module = "base.model.layers.10.self_attn.q_proj" + ".a" * 20
    if pattern_fault(key) is not None:
        return
    for name in (module, module + "b", "model.layers.1.mlp.down_proj", key):
        expected = 5 if re.match(rf"(.*\.)?({key})$", name) else 7
        assert Pattern({key: 5}).get(name, 7) == expected


@pytest.mark.parametrize("key", ["(a+)+$", "(a|a)*b", "(.*)*x", r"(\w+\.)+x", "(((a*)*)*)", r"(.)\1*\1*x"])
def test_patterns_that_could_hang_are_refused(key: str) -> None:
    assert pattern_fault(key) is not None


@pytest.mark.parametrize(
    "key", ["q_proj", r"layers\.1\..*q_proj", "model.layers.[0-9]+.self_attn.(q|k)_proj", "^model.*up_proj", ".*"]
)
def test_patterns_that_people_write_are_accepted(key: str) -> None:
    assert pattern_fault(key) is None
