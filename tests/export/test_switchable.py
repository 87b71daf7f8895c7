"""Switchable exports: one graph, every adapter, against PEFT and the DCFT forward in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_genai")

from adapter_merge.export.running import Decoder, run_all
from adapter_merge.export.switchable import export_switchable

pytestmark = pytest.mark.onnx
NAMES = ("lora", "rslora", "dora", "dude", "dcft")
TOKENS = {
    "prompt": [int(t) for t in (np.arange(40) * 37 + 11) % 250],
    "rest": [int(t) for t in np.arange(20) * 7 % 250],
}
BAR = 1e-4

Reference = Callable[[Path, "Path | None", list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def folder(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("switchable") / "export"
    export_switchable(pico, {name: adapters[name] for name in NAMES if name != "dude"}, output)
    return output


def difference(logits: Any, expected: torch.Tensor) -> float:
    return float((torch.from_numpy(logits).double() - expected).abs().max())


@pytest.mark.parametrize("name", [None, "lora", "rslora", "dora", "dcft"])
def test_logits_of_every_adapter(
    folder: Path, pico: Path, adapters: dict[str, Path], reference: Reference, name: str | None
) -> None:
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    expected = reference(pico, adapters[name] if name else None, tokens)
    got = run_all(Decoder(folder, threads=1), name, TOKENS)
    assert difference(got, expected) < BAR
    if name:
        base = reference(pico, None, tokens)
        assert float((expected - base).abs().max()) > 0.05  # an adapter that does nothing would prove nothing
