"""Every supported decoder family, exported, run with its KV cache and compared with transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import pico_config, save_lora, save_pico

pytest.importorskip("onnxruntime_genai")

from adapter_merge.export.building.decoder import ARCHITECTURES
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.modes.switchable import export_switchable

pytestmark = pytest.mark.onnx
FAMILIES = ("mistral", "mistral-window", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "granite", "smollm3")
TOKENS = {"prompt": [(37 * i + 11) % 250 for i in range(40)], "rest": [7 * i % 250 for i in range(20)]}


def test_the_table_of_architectures_is_what_is_tested() -> None:
    tested = {type(pico_config(kind)).__name__.removesuffix("Config").removesuffix("Text") for kind in FAMILIES}
    assert {name.removesuffix("ForCausalLM") for name in ARCHITECTURES} == {*tested, "Llama"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_base_and_adapter(
    kind: str, tmp_path: Path, reference: Callable[[Path, Path | None, list[int]], torch.Tensor]
) -> None:
    base = save_pico(tmp_path / "base", kind)
    dora = save_lora(base, tmp_path / "dora", 3, use_dora=True)
    export_switchable(base, {"dora": dora}, tmp_path / "out")
    decoder = Decoder(tmp_path / "out", threads=1)
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    for name, adapter in ((None, None), ("dora", dora)):
        expected = reference(base, adapter, tokens)
        got = torch.from_numpy(run_all(decoder, name, TOKENS)).double()
        scale = float(expected.abs().max())
        assert float((got - expected).abs().max()) < 1e-4 * max(1.0, scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # the latter's head is its embedding
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_adapter_on_the_head(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save_pico(tmp_path / "base", kind)
    lora = save_lora(base, tmp_path / "lora", 3, target_modules=["lm_head", "q_proj"])
    export_switchable(base, {"lora": lora}, tmp_path / "out")
    decoder = Decoder(tmp_path / "out", threads=1)
    tokens = torch.tensor([TOKENS["prompt"] + TOKENS["rest"]])
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    with torch.no_grad():
        adapted = model(input_ids=tokens).logits[0]
        with model.disable_adapter():
            plain = model(input_ids=tokens).logits[0]
    for name, expected in ((None, plain), ("lora", adapted)):
        got = torch.from_numpy(run_all(decoder, name, TOKENS))
        assert float((got - expected).abs().max()) < 1e-4
    assert float((adapted - plain).abs().max()) > 0.1


@pytest.mark.model
def test_the_shipped_adapters_on_the_real_model(smollm2_base: Path, tmp_path: Path) -> None:
    from adapter_merge.demo.walkthrough import adapter_folder
    from adapter_merge.export.checking.verification import verify_onnx

    adapters = {name: adapter_folder(name) for name in ("dcft-pirate", "dude-json")}
    export_switchable(smollm2_base, adapters, tmp_path / "out")
    for name in (None, *adapters):
        report = verify_onnx(smollm2_base, adapters[name] if name else None, tmp_path / "out", name=name)
        assert report["passed"], report["problems"]
        assert report["tokens"] >= 200
