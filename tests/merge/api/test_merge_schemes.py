"""Whole merges into every quantisation scheme: weights, config and logits against the libraries' dequantised weights.

FP8 in blocks and rows, INT4 and nf4 are in test_merge_quantised.py; here are the other schemes, and gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_bases
import peft
import pytest
import torch
import transformers
from pico_bases import TOKENS, quiet, train
from quantised_bases import OTHER_PRESETS, config_of, llama, quantised
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify

KINDS = (*OTHER_PRESETS, "int8", *packed_bases.KINDS)
TARGETS = ["q_proj", "gate_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Base = tuple[Path, dict[str, Tensor]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def make(kind: str) -> Base:
        if kind not in made:
            folder = tmp_path_factory.mktemp("base") / kind.replace(" ", "-")
            if kind == "gpt-oss":
                made[kind] = packed_bases.gpt_oss_base(folder)
            elif kind in packed_bases.KINDS:
                made[kind] = packed_bases.packed_base(kind, folder, 128)
            else:
                made[kind] = quantised(kind, folder, 128)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A LoRA or DoRA of rank 4 made by PEFT beside the unquantised Llama."""
    place, made = tmp_path_factory.mktemp("lora"), dict[bool, Path]()
    with quiet():
        llama(128).save_pretrained(place / "plain")

    def make(use_dora: bool) -> Path:
        if use_dora not in made:
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=use_dora)
            made[use_dora] = place / f"adapter-{use_dora}"
            train(place / "plain", config, made[use_dora])
        return made[use_dora]

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def live_model(dense: dict[str, Tensor], config: Any, adapter: Path) -> Any:
    """PEFT's unmerged model on the library's dequantised weights, in float32."""
    with quiet():
        kind = getattr(transformers, config["architectures"][0])
        settings = {key: value for key, value in config.items() if key != "quantization_config"}
        made = kind(kind.config_class.from_dict(settings))
        made.load_state_dict({name: value.float() for name, value in dense.items()}, strict=True)
        return peft.PeftModel.from_pretrained(made.float().eval(), adapter).eval()


def merged_model(folder: Path) -> Any:
    """What transformers loads: nothing missing, nothing left over."""
    with quiet():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="auto"
        )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def pefts_weights(live: Any) -> dict[str, Tensor]:
    """The weights that PEFT merges in float64, by their names in the base."""
    with quiet():
        state: dict[str, Tensor] = live.double().merge_and_unload().state_dict()
    return state


def check_weights(found: dict[str, Tensor], wanted: dict[str, Tensor], dense: dict[str, Tensor], dtype: str) -> int:
    """Every tensor is PEFT's or the library's, rounded once; return how many were adapted."""
    assert found.keys() == dense.keys()
    adapted = 0
    for name, value in found.items():
        exact = wanted[name]
        if torch.equal(exact, dense[name].double()):
            assert torch.equal(value.double(), dense[name].to(value.dtype).double()), name
            continue
        adapted += 1
        assert value.dtype == DTYPES[dtype], name
        right = exact.to(DTYPES[dtype])
        # float32 sums are off by their last bits: beside a tie the other neighbour may come out
        off = (value.double() - exact).abs() - (right.double() - exact).abs()
        assert float(off.max()) <= 1e-6 * float(exact.abs().max()), name
        assert dtype == "float32" or float((value != right).float().mean()) < 1e-3, name
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whole_merges(kind: str, bases: Callable[[str], Base], loras: Callable[[bool], Path], tmp_path: Path) -> None:
    base, dense = bases(kind)
    lora = loras(False)
    config = config_of(base)
    wanted = pefts_weights(live_model(dense, config, lora))
    for dtype in DTYPES:
        out = tmp_path / dtype
        merge(base, lora, out, MergeOptions(write_as=dtype))
        assert check_weights(tensors_of(out), wanted, dense, dtype) == 2 * len(TARGETS)
        assert "quantization_config" not in config_of(out)
        merged_model(out)
    live = live_model(dense, config, lora)
    with torch.no_grad():
        expected, got = live(TOKENS).logits, merged_model(tmp_path / "float32").float()(TOKENS).logits
        with live.disable_adapter():
            assert float((live(TOKENS).logits - expected).abs().max()) > 0.1
    assert float((got - expected).abs().max()) <= 1e-4
    only = VerifyOptions(weights_only=kind != "awq", generated=2)  # all of it for one: it takes seconds
    assert verify(base, lora, tmp_path / "float32", only).passed


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_dora_take_their_row_norms_from_the_dequantised_weight(
    kind: str, bases: Callable[[str], Base], loras: Callable[[bool], Path], tmp_path: Path
) -> None:
    """The exact factors in PEFT on the dequantised base compute what DoRA computes there; verify agrees."""
    base, dense = bases(kind)
    factor(base, loras(True), tmp_path / "factors")
    config = config_of(base)
    live, made = live_model(dense, config, loras(True)), live_model(dense, config, tmp_path / "factors")
    with torch.no_grad():
        expected = live(TOKENS).logits
        assert float((made(TOKENS).logits - expected).abs().max()) <= 1e-4
    assert verify(base, loras(True), tmp_path / "factors", VerifyOptions(weights_only=True)).passed


def test_experts_of_gpt_oss(bases: Callable[[str], Base], tmp_path: Path) -> None:
    """MXFP4 experts with a LoRA on the experts and on attention, against PEFT on what transformers dequantises."""
    base, dense = bases("gpt-oss")
    with quiet():
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS)
        plain = tmp_path / "plain"
        kind = transformers.GptOssForCausalLM
        settings = {key: value for key, value in config_of(base).items() if key != "quantization_config"}
        kind(kind.config_class.from_dict(settings)).save_pretrained(plain)
    train(plain, config, tmp_path / "adapter")
    wanted = pefts_weights(live_model(dense, config_of(base), tmp_path / "adapter"))
    for dtype in DTYPES:
        merge(base, tmp_path / "adapter", tmp_path / dtype, MergeOptions(write_as=dtype))
        found = tensors_of(tmp_path / dtype)
        assert not [name for name in found if name.endswith(("_blocks", "_scales"))]
        adapted = {name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
        assert len(adapted) == 4
        check_weights({name: found[name] for name in adapted}, wanted, {name: dense[name] for name in adapted}, dtype)
        assert "quantization_config" not in config_of(tmp_path / dtype)
    live = live_model(dense, config_of(base), tmp_path / "adapter")
    merge_in_32 = merged_model(tmp_path / "float32").float()
    with torch.no_grad():
        off = float((merge_in_32(TOKENS).logits - live(TOKENS).logits).abs().max())
    assert off <= 0.05  # q_proj is bfloat16 in the base, and stays so
    assert verify(base, tmp_path / "adapter", tmp_path / "float32", VerifyOptions(generated=2)).passed
