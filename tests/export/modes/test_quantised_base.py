"""Exports of a quantised base: merged into its dequantised weights, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("onnxruntime_genai")

from adapter_merge.errors import UnsupportedError
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.exporting import export_model

pytestmark = pytest.mark.onnx
TOKENS = {"prompt": [(37 * i + 11) % 250 for i in range(40)], "rest": [7 * i % 250 for i in range(20)]}
ALL = TOKENS["prompt"] + TOKENS["rest"]


@pytest.fixture(scope="module")
def bases(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`pico` in nf4, saved by transformers, and the same model from the weights that bitsandbytes dequantises."""
    packed, dense = (tmp_path_factory.mktemp("base") / name for name in ("nf4", "dense"))
    # Not down_proj: its 96 inputs are no multiple of the block, where dequantize_4bit is wrong on a CPU.
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            pico, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        model.save_pretrained(packed)
        state = {}
        for name, value in model.named_parameters():
            quantised = getattr(value, "quant_state", None)
            state[name] = value.data if quantised is None else bnb.functional.dequantize_4bit(value.data, quantised)
        plain = transformers.AutoModelForCausalLM.from_pretrained(pico)
        plain.load_state_dict(state)
        plain.save_pretrained(dense)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pico)
    for folder in (packed, dense):
        tokenizer.save_pretrained(folder)
    return packed, dense


def test_a_quantised_base_is_merged_and_exported(
    bases: tuple[Path, Path], adapters: dict[str, Path], reference: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    packed, dense = bases
    export_model(packed, {"dora": adapters["dora"]}, tmp_path / "out", mode="merged")
    got: np.ndarray = run_all(Decoder(tmp_path / "out", threads=1), None, TOKENS)
    expected = reference(dense, adapters["dora"], ALL)
    assert float((torch.from_numpy(got).double() - expected).abs().max()) < 1e-4
    effect = float((expected - reference(dense, None, ALL)).abs().max())
    assert effect > 1e-2


@pytest.mark.parametrize(("mode", "named"), [("merged", ()), ("switchable", ("lora",)), ("batched", ("lora",))])
def test_other_exports_are_refused(
    mode: str, named: tuple[str, ...], bases: tuple[Path, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="is quantised"):
        export_model(bases[0], {name: adapters[name] for name in named}, tmp_path / "out", mode=mode)
    assert list(tmp_path.iterdir()) == []
