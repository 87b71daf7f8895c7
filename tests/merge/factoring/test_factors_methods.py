"""Every kind of PEFT folder as factors: loaded by PEFT they compute what was trained, or it is said that none can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from peft_cases import BASES, CASES, TOLERANCE
from pico_bases import error, load, logits, quiet, train

from adapter_merge.api.factor import factor
from adapter_merge.api.options import FactorOptions
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import UnsupportedError
from adapter_merge.factoring.end_to_end import compare

# Only a merge can do these: replaced rows, biases, and norms of an embedding's columns.
NO_FACTORS = {
    "lora_bias",
    "embedding DoRA",
    "tokens",
    "tokens, tied",
    "tokens of two modules",
    "tokens alone",
}
# Adapted by target_parameters: their factors are exact or not at all.
EXACT_ONLY = {
    "experts, apart on disk",
    "experts, one parameter",
    "experts, patterns",
    "experts of gpt-oss",
    "square experts of gpt-oss",
    "experts of Llama 4",
    "square experts of Llama 4",
    "a bare 2-D parameter",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = BASES[name](tmp_path_factory.mktemp("base") / name)
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_factors_compute_what_was_trained(case: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    name, kind, arguments = CASES[case]
    with quiet():
        config = getattr(peft, kind)(**arguments)
    live = train(base(name), config, tmp_path / "adapter", scale=0.03 if "OLoRA" in case else 0.1)
    expected = logits(live)
    if case in NO_FACTORS:
        with pytest.raises(UnsupportedError, match="merge this adapter instead"):
            factor(base(name), tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    content = factor(base(name), tmp_path / "adapter", tmp_path / "out").as_json()
    assert content["certificate"]["max_relative_error"] < 2e-5
    with quiet():
        loaded = peft.PeftModel.from_pretrained(load(base(name)), str(tmp_path / "out")).eval()
    assert error(logits(loaded), expected) < TOLERANCE
    if case in EXACT_ONLY:
        with pytest.raises(UnsupportedError, match="factors are written exactly"):
            factor(base(name), tmp_path / "adapter", tmp_path / "limited", FactorOptions(rank=2))
        assert not (tmp_path / "limited").exists()
        return
    end = compare(open_pair(base(name), tmp_path / "adapter"), tmp_path / "out")
    assert end["max_dlogit"] < 5 * TOLERANCE < end["effect"]
    limited = factor(base(name), tmp_path / "adapter", tmp_path / "limited", FactorOptions(rank=2)).as_json()
    assert limited["certificate"]["ranks"][1] <= 2
    assert limited["form"] == "lora"


def test_scales_of_columns_are_not_kept_beside_truncated_factors(base: Callable[[str], Path], tmp_path: Path) -> None:
    name, kind, arguments = CASES["embedding DoRA"]
    with quiet():
        train(base(name), getattr(peft, kind)(**arguments), tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="a scale of the input columns cannot be kept"):
        factor(base(name), tmp_path / "adapter", tmp_path / "factors", FactorOptions(rank=2, keep_scale=True))
    assert not (tmp_path / "factors").exists()
