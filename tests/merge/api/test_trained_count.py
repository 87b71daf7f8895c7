"""The number of trained values that inspect states, against PEFT's own count and the demo's stored tensors."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from peft_cases import BASES, CASES
from pico_bases import train
from safetensors.torch import load_file

import adapter_merge
from adapter_merge import inspect

COUNTED = (
    "lora",
    "DoRA",
    "DuDe",
    "bias all",
    "modules_to_save",
    "VeRA",
    "VeRA from its seed",
    "experts, patterns",
    "experts of gpt-oss",
)


@pytest.mark.parametrize("case", COUNTED)
def test_inspect_counts_what_peft_trains(case: str, tmp_path: Path) -> None:
    base, kind, settings = CASES[case]
    live = train(BASES[base](tmp_path / "base"), getattr(peft, kind)(**settings), tmp_path / "adapter")
    trainable, _ = live.get_nb_trainable_parameters()
    assert inspect(tmp_path / "adapter").as_json()["parameters"] == trainable > 0


def test_ranknum_of_dcft_is_not_trained() -> None:
    (package,) = adapter_merge.__path__
    folder = Path(package) / "demo" / "adapters" / "dcft-pirate"
    stored = load_file(folder / "adapter_model.safetensors")
    trained = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("ranknum"))
    assert inspect(folder).as_json()["parameters"] == trained < sum(tensor.numel() for tensor in stored.values())
