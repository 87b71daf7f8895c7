"""What PEFT can train: bases, and a configuration of every kind; and what one of its conversions loses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_bases import (
    gpt2,
    gpt_oss,
    llama,
    llama4,
    load,
    logits,
    mixtral,
    quiet,
    qwen3_moe,
    randomise,
)

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")

SOME = ["q_proj", "v_proj", "down_proj"]
TOLERANCE = 2e-5  # float32 logits of size 5

BASES: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    "tied": lambda folder: llama(folder, tied=True),
    "biased": lambda folder: llama(folder, bias=True),
    "gpt2": gpt2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "gpt_oss, square": lambda folder: gpt_oss(folder, 32),
    "llama4": llama4,
    "llama4, square": lambda folder: llama4(folder, 32),
}

EXPERTS = {
    "r": 2,
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME}),
    "rank_pattern, alpha_pattern, rsLoRA": (
        "llama",
        "LoraConfig",
        {
            "r": 4,
            "target_modules": SOME,
            "rank_pattern": {r"layers\.1\..*q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"v_proj": 5},
            "use_rslora": True,
        },
    ),
    "DoRA": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "use_dora": True}),
    "PiSSA": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "init_lora_weights": "pissa"}),
    "DuDe": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "init_lora_weights": "pissa", "use_dora": True}),
    "OLoRA": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "init_lora_weights": "olora"}),
    "OLoRA with DoRA": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "init_lora_weights": "olora", "use_dora": True},
    ),
    "orthogonal": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "init_lora_weights": "orthogonal"}),
    "MiCA": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "init_lora_weights": "mica"}),
    "bias all": ("biased", "LoraConfig", {"r": 4, "target_modules": SOME, "bias": "all"}),
    "bias lora_only": ("biased", "LoraConfig", {"r": 4, "target_modules": SOME, "bias": "lora_only"}),
    "lora_bias": ("biased", "LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "modules_to_save": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "modules_to_save": ["lm_head", "norm"]},
    ),
    "saved embedding, tied": (
        "tied",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "modules_to_save": ["embed_tokens"]},
    ),
    "saved embedding and head, tied": (
        "tied",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "saved embedding, kept tied": (
        "tied",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "layers_to_transform": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "all-linear, exclude_modules": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ),
    "embedding": ("llama", "LoraConfig", {"r": 4, "target_modules": [*SOME, "embed_tokens"]}),
    "embedding DoRA": ("llama", "LoraConfig", {"r": 4, "target_modules": [*SOME, "embed_tokens"], "use_dora": True}),
    "embedding, tied": ("tied", "LoraConfig", {"r": 4, "target_modules": ["embed_tokens"]}),
    "embedding, kept tied": (
        "tied",
        "LoraConfig",
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "head": ("llama", "LoraConfig", {"r": 4, "target_modules": ["lm_head"]}),
    "head, tied": ("tied", "LoraConfig", {"r": 4, "target_modules": ["lm_head"]}),
    "embedding and head, tied": ("tied", "LoraConfig", {"r": 4, "target_modules": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", "LoraConfig", {"r": 4, "target_modules": SOME, "trainable_token_indices": [3, 9, 30]}),
    "tokens, tied": ("tied", "LoraConfig", {"r": 4, "target_modules": SOME, "trainable_token_indices": [3, 9, 30]}),
    "tokens of two modules": (
        "llama",
        "LoraConfig",
        {"r": 4, "target_modules": SOME, "trainable_token_indices": {"embed_tokens": [30, 2], "lm_head": [1, 5]}},
    ),
    "tokens alone": ("llama", "TrainableTokensConfig", {"token_indices": [3, 9], "target_modules": ["embed_tokens"]}),
    "Conv1D": ("gpt2", "LoraConfig", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D DoRA": (
        "gpt2",
        "LoraConfig",
        {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "Conv1D DuDe": (
        "gpt2",
        "LoraConfig",
        {
            "r": 4,
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
            "use_dora": True,
            "init_lora_weights": "pissa",
        },
    ),
    "Conv1D and wte": ("gpt2", "LoraConfig", {"r": 4, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "AdaLoRA": ("llama", "AdaLoraConfig", {"init_r": 6, "target_r": 4, "target_modules": SOME, "total_step": 10}),
    "LoKr": ("llama", "LoKrConfig", {"r": 2, "alpha": 3, "target_modules": SOME}),
    "LoKr, both decomposed": (
        "llama",
        "LoKrConfig",
        {"r": 2, "alpha": 3, "target_modules": SOME, "decompose_both": True, "rank_pattern": {"q_proj": 1}},
    ),
    "LoKr, both full": ("llama", "LoKrConfig", {"r": 64, "alpha": 3, "target_modules": SOME}),
    "LoHa": ("llama", "LoHaConfig", {"r": 3, "alpha": 5, "target_modules": SOME}),
    "VeRA": ("llama", "VeraConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "VeRA from its seed": (
        "llama",
        "VeraConfig",
        {"r": 8, "target_modules": ["q_proj", "v_proj"], "save_projection": False},
    ),
    "experts, apart on disk": (
        "mixtral",
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts, one parameter": (
        "qwen3_moe",
        "LoraConfig",
        {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "experts, patterns": (
        "qwen3_moe",
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "use_rslora": True,
            "alpha_pattern": {"experts.gate_up_proj": 7},
            "rank_pattern": {"experts.gate_up_proj": 3},
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "experts of gpt-oss": ("gpt_oss", "LoraConfig", EXPERTS),
    "square experts of gpt-oss": ("gpt_oss, square", "LoraConfig", EXPERTS),
    "experts of Llama 4": ("llama4", "LoraConfig", EXPERTS),
    "square experts of Llama 4": ("llama4, square", "LoraConfig", EXPERTS),
    "a bare 2-D parameter": (
        "llama",
        "LoraConfig",
        {"r": 2, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    ),
}


def bases(factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base of BASES, made when it is first asked for."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            with quiet():
                made[name] = BASES[name](factory.mktemp(name) / "base")
        return made[name]

    return make


def merged_logits(base: Path, adapter: Path, output: Path, **options: Any) -> torch.Tensor:
    merge(base, adapter, output, MergeOptions(device="cpu", **options))
    return logits(load(output))


def converted_dude(base: Path, folder: Path) -> Any:
    """A DuDe saved with path_initial_model_for_weight_conversion: PEFT drops its magnitudes."""
    config = peft.LoraConfig(r=4, target_modules=SOME, init_lora_weights="pissa", use_dora=True)
    with quiet():
        model = peft.get_peft_model(load(base), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial")
        randomise(model)
        model.eval()
        model.peft_config["default"].init_lora_weights = "pissa"
        model.save_pretrained(folder / "kept")
        expected = logits(model)
        model.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "initial"))
    return expected
