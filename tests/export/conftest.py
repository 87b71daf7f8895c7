"""Fixtures of the ONNX tests. Warnings of other packages are ignored one by one, only for these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import add_dcft, save_dcft, save_lora, save_pico

IGNORED: tuple[str, ...] = (
    # PEFT 0.21 asks transformers 5.23 by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.preloaded("onnxruntime_genai.models.builder", "onnxscript"))
            for pattern in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(pattern))


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama."""
    return save_pico(tmp_path_factory.mktemp("pico") / "llama", "llama")


@pytest.fixture(scope="session")
def adapters(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of every kind on `pico`, with different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return {
        "lora": save_lora(pico, root / "lora", 1, target_modules=["q_proj", "v_proj", "down_proj"]),
        "rslora": save_lora(pico, root / "rslora", 2, use_rslora=True, rank_pattern={"k_proj": 2, "up_proj": 7}),
        "dora": save_lora(pico, root / "dora", 3, use_dora=True, target_modules=attention),
        "dude": save_lora(pico, root / "dude", 4, use_dora=True, init_lora_weights="pissa"),
        "dcft": save_dcft(pico, root / "dcft", 5, ("q_proj", "k_proj", "gate_proj", "down_proj")),
    }


@pytest.fixture(scope="session")
def switchable(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A switchable export of `pico` with every adapter but DuDe, which a test adds later."""
    pytest.importorskip("onnxruntime_genai")
    from adapter_merge.export.modes.switchable import export_switchable

    output = tmp_path_factory.mktemp("switchable") / "export"
    export_switchable(pico, {name: path for name, path in adapters.items() if name != "dude"}, output)
    return output


@pytest.fixture(scope="session")
def batched(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batched export of `pico` with lora and dcft."""
    pytest.importorskip("onnxruntime_genai")
    from adapter_merge.export.modes.batched import export_batched

    output = tmp_path_factory.mktemp("batched") / "export"
    export_batched(pico, {name: adapters[name] for name in ("lora", "dcft")}, output)
    return output


@pytest.fixture(scope="session")
def reference() -> Callable[[Path, Path | None, list[int]], torch.Tensor]:
    """Logits (positions, vocabulary) in float64 of a base, or of a base with an adapter, without our code.

    PEFT runs what PEFT knows; DCFT is the reference's forward, written out.
    """

    def run(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        if adapter is not None:
            config = json.loads((adapter / "adapter_config.json").read_text())
            if config["peft_type"] == "DCFT":
                add_dcft(model, adapter, config)
            else:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model = model.double().eval()
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return logits

    return run
