"""Factors of stacked experts: PEFT loads the folder, and its live forward is that of the adapter as trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import MIXTURES, inputs, mixture, vision
from pico_bases import gpt_oss, llama4, quiet, randomise
from safetensors.torch import load_file, save_file

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import InputError, UnsupportedError

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")
transformers = pytest.importorskip("transformers", reason="transformers makes and loads the models (extra verify)")

TOLERANCE = 2e-5  # float32 logits of size 5
BOTH = ["gate_up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear, router included": ("qwen3_moe", {"target_modules": "all-linear"}),
    "experts alone": ("mixtral", {"target_modules": [], "target_parameters": BOTH}),
    "one parameter, patterns, rsLoRA": (
        "olmoe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
            "rank_pattern": {"down_proj": 3, r"layers\.0\..*q_proj": 6},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "head saved": (
        "qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": BOTH, "modules_to_save": ["lm_head"]}
    ),
    "square": ("granitemoe, square", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "vision and language": ("qwen3_vl_moe, square", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "stored as (in, out)": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "stored as (in, out), square": ("gpt_oss, square", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "llama4": ("llama4", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
}  # fmt: skip


def other(name: str, folder: Path) -> Path:
    """The two classes that store experts as (E, in, out)."""
    make = gpt_oss if name.startswith("gpt_oss") else llama4
    with quiet():
        return make(folder, 32 if "square" in name else 24)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("base")
            kinds = mixture if name in MIXTURES else other if name.startswith(("gpt_oss", "llama4")) else vision
            made[name] = kinds(name, folder)
        return made[name]

    return make


def load(folder: Path) -> Any:
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with quiet():
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, name: str) -> torch.Tensor:
    given = inputs("mixtral" if name.startswith(("gpt_oss", "llama4")) else name)
    with torch.no_grad(), quiet():
        result: torch.Tensor = model(**given).logits
    return result


def train(base: Path, folder: Path, name: str, **options: Any) -> torch.Tensor:
    """A PEFT adapter with random values, saved to `folder`; the logits of the live model."""
    with quiet():
        live = peft.get_peft_model(load(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
        randomise(live, 0.1)
        live.eval().save_pretrained(folder)
        expected = logits(live, name)
    assert (expected - logits(load(base), name)).abs().max() > 100 * TOLERANCE, "the adapter must move the logits"
    return expected


def live_logits(base: Path, folder: Path, name: str) -> torch.Tensor:
    with quiet():
        return logits(peft.PeftModel.from_pretrained(load(base), folder).eval(), name)


@pytest.mark.parametrize("case", CASES)
def test_peft_runs_the_written_folder(case: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    name, options = CASES[case]
    base = bases(name)
    expected = train(base, tmp_path / "a", name, **options)
    content = factor(base, tmp_path / "a", tmp_path / "factors").as_json()
    assert content["exact"] and content["experts"] > 0
    config = json.loads((tmp_path / "factors" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    assert (live_logits(base, tmp_path / "factors", name) - expected).abs().max() < TOLERANCE
    assert verify(base, tmp_path / "a", tmp_path / "factors", VerifyOptions(weights_only=True)).passed
    merge(base, tmp_path / "factors", tmp_path / "out", MergeOptions(device="cpu"))
    assert (logits(load(tmp_path / "out"), name) - expected).abs().max() < 2 * TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss, square"])
def test_factors_in_an_older_orientation_are_turned(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Before 0.19 the factors of (E, n, m) were A (E r, n) and B (m, r E), for every class."""
    base = bases(name)
    expected = train(base, tmp_path / "a", name, target_modules=[], target_parameters=BOTH)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    if name == "mixtral":  # gpt_oss is written by 0.21 as it was by 0.18
        for key in [key for key in tensors if "lora_A" in key]:
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            four, wide = a.reshape(4, 4, -1), b.reshape(-1, 4, 4)  # (E, r, m), (n, r, E)
            tensors[key] = wide.permute(2, 1, 0).reshape(16, -1).contiguous()
            tensors[key.replace("lora_A", "lora_B")] = four.permute(2, 1, 0).reshape(-1, 16).contiguous()
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    factor(base, tmp_path / "a", tmp_path / "factors")
    assert (live_logits(base, tmp_path / "factors", name) - expected).abs().max() < TOLERANCE


def test_what_a_folder_cannot_hold_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("qwen3_moe")
    train(base, tmp_path / "a", "qwen3_moe", target_modules=["q_proj"], target_parameters=BOTH)
    with pytest.raises(InputError, match="whose number the base tells"):
        factor(None, tmp_path / "a", tmp_path / "out")
    for options in (FactorOptions(rank=2), FactorOptions(budget=1.0), FactorOptions(format="gguf")):
        with pytest.raises(UnsupportedError, match="written exactly and as a PEFT folder only"):
            factor(base, tmp_path / "a", tmp_path / "out", options)
    with pytest.raises(UnsupportedError, match="does not run"):
        factor(base, tmp_path / "a", tmp_path / "out", FactorOptions(end_to_end=True))
    assert not (tmp_path / "out").exists()


def test_one_wrong_expert_fails_the_proof(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    train(base, tmp_path / "a", "mixtral", target_modules=[], target_parameters=BOTH)
    factor(base, tmp_path / "a", tmp_path / "factors")
    file = tmp_path / "factors" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][:, 3::4] *= 1.01  # the last of four experts
    save_file(tensors, file, {"format": "pt"})
    assert not verify(base, tmp_path / "a", tmp_path / "factors", VerifyOptions(weights_only=True)).passed


def single_experts(base: Path, folder: Path, method: str) -> Path:
    """An adapter of transformers 4: every expert is a module of its own. Attention is adapted as well."""
    torch.manual_seed(7)
    weights = load_file(base / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {"target_modules": ["w1", "w2", "w3", "q_proj"]}
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        if not name.endswith(tuple(config["target_modules"])):
            continue
        stem, (out, inner) = f"base_model.model.{name}", weight.shape
        rank = 4 if name.endswith("q_proj") else 2
        if method == "DCFT":
            tensors[f"{stem}.lora_A"] = torch.randn(1, inner // rank)
            tensors[f"{stem}.lora_B"] = torch.randn(out // rank, 1)
            tensors[f"{stem}.lora_C"] = 0.3 * torch.randn(1, 1, rank, rank)
            tensors[f"{stem}.ranknum"] = torch.tensor([float(rank)])
        else:
            tensors[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(2, inner)
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(out, 2)
            if method == "DoRA":
                tensors[f"{stem}.lora_magnitude_vector"] = weight.norm(dim=1) * (1 + 0.1 * torch.randn(out))
    if method == "DCFT":
        config |= {
            "peft_type": "DCFT",
            "format_version": 1,
            "r": 1,
            "kernel_size": None,
            "stride": None,
            "lora_alpha": 8.0,
        }
    else:
        config |= {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": method == "DoRA"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("method", "options"), [
    ("LoRA", FactorOptions()), ("DCFT", FactorOptions()), ("DoRA", FactorOptions(rank=0.8)),
    ("DCFT", FactorOptions(budget=0.01)),
])  # fmt: skip
def test_single_experts_load_in_peft(
    method: str, options: FactorOptions, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT stacks them for transformers 5, all of one rank, by the config's r; vLLM reads them by expert."""
    base = bases("mixtral")
    adapter = single_experts(base, tmp_path / "a", method)
    factor(base, adapter, tmp_path / "factors", options)
    live = live_logits(base, tmp_path / "factors", "mixtral")
    merge(base, tmp_path / "factors", tmp_path / "out", MergeOptions(device="cpu"))
    assert (live - logits(load(tmp_path / "out"), "mixtral")).abs().max() < TOLERANCE
    assert (live - logits(load(base), "mixtral")).abs().max() > 0.1
    if not options.is_truncation:
        merge(base, adapter, tmp_path / "whole", MergeOptions(device="cpu"))
        assert (live - logits(load(tmp_path / "whole"), "mixtral")).abs().max() < TOLERANCE


def test_an_expert_with_a_row_scale_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    adapter = single_experts(base, tmp_path / "a", "DoRA")
    for options in (FactorOptions(), FactorOptions(rank=2, keep_scale=True)):
        with pytest.raises(UnsupportedError, match="an expert with a row scale"):
            factor(base, adapter, tmp_path / "out", options)
    config = json.loads((adapter / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="use_dora"), quiet():  # as PEFT itself does
        peft.PeftModel.from_pretrained(load(base), adapter)
    assert config["use_dora"]
