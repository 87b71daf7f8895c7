"""LoftQ: PEFT's own initialisation replaces the base by deq(nf4(W - B0 A0)), and the adapter belongs to that base."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import layer
from peft.utils import loftq_utils
from pico_bases import TOKENS, load, quiet, randomise
from quantised_bases import llama
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import UnsupportedError
from adapter_merge.formats.stated_settings import ReadOptions

TARGETS = ["q_proj", "down_proj"]


class Trained(NamedTuple):
    original: Path
    residual: Path  # the base after the initialisation, as LoftQ's authors publish it, 16 or 32 bits
    adapter: Path
    merged: dict[str, Tensor]  # PEFT's own merge, float32
    logits: Tensor  # of the live adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("loftq")
    # PEFT's function computes on a GPU alone; its own source, on the CPU.
    source = inspect.getsource(loftq_utils.loftq_init)
    assert 'else "cuda"' in source
    names: dict[str, Any] = dict(vars(loftq_utils))
    exec(source.replace('else "cuda"', 'else "cpu"'), names)
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "loftq_init", names["loftq_init"])
        llama(64, torch.float32).save_pretrained(place / "original")
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
        config.init_lora_weights = "loftq"  # not in the constructor, which asks for scipy and does not use it
        config.loftq_config = vars(peft.LoftQConfig(loftq_bits=4, loftq_iter=2))
        model = peft.get_peft_model(load(place / "original"), config).eval()
        randomise(model, 0.02)
        model.save_pretrained(place / "adapter")
        with torch.no_grad():
            logits = model(TOKENS).logits
        merged = {name: value.clone() for name, value in model.merge_and_unload().state_dict().items()}
        again = peft.get_peft_model(load(place / "original"), config).unload()
        again.save_pretrained(place / "residual")
    return Trained(place / "original", place / "residual", place / "adapter", merged, logits)


def largest_error(folder: Path, wanted: dict[str, Tensor]) -> float:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - wanted[name].double()).abs().max()) for name in wanted)


def test_the_original_base_is_refused(trained: Trained, tmp_path: Path) -> None:
    for kind in (None, "original"):
        with pytest.raises(UnsupportedError, match=r"loftq.*replaced the base by a quantised one") as raised:
            merge(trained.original, trained.adapter, tmp_path / "out", MergeOptions(base_kind=kind))
        assert "--base-kind residual" in str(raised.value.problems[0].expected)
    assert not (tmp_path / "out").exists()


def test_the_residual_folder_is_merged(trained: Trained, tmp_path: Path) -> None:
    merge(trained.residual, trained.adapter, tmp_path / "out", MergeOptions(base_kind="residual"))
    assert largest_error(tmp_path / "out", trained.merged) <= 1e-6
    with quiet(), torch.no_grad():
        logits = load(tmp_path / "out")(TOKENS).logits
    assert float((logits - trained.logits).abs().max()) <= 1e-4
    assert verify(
        trained.residual, trained.adapter, tmp_path / "out", VerifyOptions(base_kind="residual", generated=2)
    ).passed


def test_the_residual_folder_in_4_bits_is_the_same(trained: Trained, tmp_path: Path) -> None:
    """nf4(deq(nf4(W))) is nf4(W): quantised by bitsandbytes on disk, or on loading at training."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", *(f"{name}_proj" for name in ("k", "v", "o", "gate", "up"))],
    )  # fmt: skip
    with quiet():
        stored: Any = transformers.LlamaForCausalLM.from_pretrained(
            trained.residual, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        stored.save_pretrained(tmp_path / "nf4")
    options = MergeOptions(base_kind="residual", write_as="float32")
    merge(tmp_path / "nf4", trained.adapter, tmp_path / "out", options)
    assert largest_error(tmp_path / "out", trained.merged) <= 1e-6
    stated = MergeOptions(base_kind="residual", reading=ReadOptions(trained_on="nf4"))
    merge(trained.residual, trained.adapter, tmp_path / "loaded", stated)
    found = load_file(tmp_path / "loaded" / "model.safetensors")
    for name, wanted in trained.merged.items():
        if any(target in name for target in TARGETS):
            assert float((found[name] - wanted).abs().max()) <= 1e-6, name
