"""Live layers against the weights' formulas, where the residual of a half-precision base may round either way."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter_merge as am
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.verification.live_probes import find_formula_errors
from adapter_merge.verification.streamed_adapter import streamed_trained
from adapter_merge.verification.weight_formulas import Adapted, tensor_formula
from adapter_merge.verification.whole_formulas import modules_by_tensor

HALF = ReadOptions(residual_dtype="bfloat16")


def _half_precision_pair(kind: str, method: str, place: Path) -> tuple[Path, Path]:
    base = pico.save_base(pico.pico_model(kind, torch.bfloat16), place / "base")
    pico.peft_adapter(pico.pico_model(kind, torch.bfloat16), kind, place / "adapter", **pico.METHODS[method])
    return base, place / "adapter"


# In each of these an element of the residual lies between two bfloat16 numbers, and PEFT takes the other one.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["pissa", "dude"])
def test_a_residual_that_rounds_to_its_other_side_is_no_other_weight(kind: str, method: str, tmp_path: Path) -> None:
    base, adapter = _half_precision_pair(kind, method, tmp_path)
    bound = open_pair(base, adapter, None, HALF)
    assert find_formula_errors(bound, streamed_trained(bound, torch.float64)) == []

    (tmp_path / "wrong").mkdir()  # a live adapter that is off by a thousandth in one weight is seen all the same
    (tmp_path / "wrong" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name] * 1.001}, tmp_path / "wrong" / "adapter_model.safetensors")
    wrong = find_formula_errors(bound, streamed_trained(open_pair(base, tmp_path / "wrong", None, HALF), torch.float64))
    assert len(wrong) == 1 and wrong[0].removesuffix(".weight") in name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # norms of columns and of rows, as the weight is stored
def test_slack_holds_what_rounding_does_to_a_norm(kind: str, tmp_path: Path) -> None:
    """W' of DuDe from its definition, with every element of the residual that may round either way on its other side.

    The norm of its row moves as well, and with it elements that are sure of their own rounding.
    """
    bound = open_pair(*_half_precision_pair(kind, "dude", tmp_path), None, HALF)
    moved = 0
    for items in modules_by_tensor(bound).values():
        formula = tensor_formula(items, Sources())
        what = formula.steps[0].change
        assert isinstance(what, Adapted) and what.magnitude is not None
        base = read_tensor(items[0].weight).to(torch.float64)
        after, slack = formula.after(base, 0)
        frozen, loose = what.frozen(base, 0, Sources())
        assert slack is not None and loose is not None
        assert float(slack.max()) <= 4 * float(loose.max())
        for sign in (1, -1):  # to first order: the rest is below a fiftieth of it
            direction = frozen + sign * loose + what.delta(0, base.shape[0])
            axis = 0 if what.by_column else 1
            norm = direction.norm(dim=axis, keepdim=True)
            other = direction * what.magnitude.reshape(norm.shape) / norm
            off = (other - after).abs()
            assert bool((off <= slack * 1.02 + 1e-14).all())
            moved += int(((off > 1e-12) & (loose == 0)).sum())
    assert moved > 0


def test_dude_beside_a_bfloat16_base_passes_in_float32_too(tmp_path: Path) -> None:
    base, adapter = _half_precision_pair("llama", "dude", tmp_path)
    am.merge(base, adapter, tmp_path / "merged", am.MergeOptions(dtype="float32", reading=HALF))
    report = am.verify(base, adapter, tmp_path / "merged", am.VerifyOptions(generated=4, reading=HALF))
    assert report.passed, report.problems
