"""A pico adapter of every PEFT type that PEFT's own layer merges: config class and arguments."""

from __future__ import annotations

from typing import Any

SOME = ["q_proj", "v_proj", "down_proj"]
BIASED = ["q_proj", "v_proj"]  # the layers of the biased pico Llama that have a bias

# peft_type -> (base of peft_cases.BASES, config class, arguments)
LAYER_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BEFT": ("biased", "BeftConfig", {"target_modules": BIASED}),
    "BOFT": ("llama", "BOFTConfig", {"target_modules": SOME, "boft_block_size": 4}),
    "C3A": ("llama", "C3AConfig", {"target_modules": SOME, "block_size": 8}),
    "DEFT": ("llama", "DeftConfig", {"target_modules": SOME, "r": 4}),
    "DELORA": ("llama", "DeloraConfig", {"target_modules": SOME, "r": 4}),
    "FOURIERFT": ("llama", "FourierFTConfig", {"target_modules": SOME, "n_frequency": 20, "scaling": 20.0}),
    "GLORA": ("biased", "GloraConfig", {"target_modules": SOME, "r": 4}),
    "GRALORA": ("llama", "GraloraConfig", {"target_modules": SOME, "r": 4}),
    "HIRA": ("llama", "HiraConfig", {"target_modules": SOME, "r": 4}),
    "HRA": ("llama", "HRAConfig", {"target_modules": SOME, "r": 4}),
    "IA3": ("biased", "IA3Config", {"target_modules": SOME, "feedforward_modules": ["down_proj"]}),
    "MISS": ("llama", "MissConfig", {"target_modules": SOME, "r": 4}),
    "OFT": ("llama", "OFTConfig", {"target_modules": SOME, "oft_block_size": 8}),
    "OSF": ("llama", "OSFConfig", {"target_modules": SOME}),
    "PEANUT": ("llama", "PeanutConfig", {"target_modules": SOME, "r": 4}),
    "PSOFT": ("llama", "PsoftConfig", {"target_modules": SOME, "r": 4}),
    "PVERA": ("llama", "PveraConfig", {"target_modules": SOME, "r": 4}),
    "RANDLORA": ("llama", "RandLoraConfig", {"target_modules": SOME, "r": 4, "randlora_alpha": 8}),
    "ROAD": ("biased", "RoadConfig", {"target_modules": SOME, "group_size": 8}),
    "SHIRA": ("llama", "ShiraConfig", {"target_modules": SOME, "r": 2}),
    "SUPERTUNING": ("llama", "SupertuningConfig", {"target_modules": SOME}),
    "VBLORA": ("llama", "VBLoRAConfig", {"target_modules": SOME, "r": 4, "vector_length": 8, "num_vectors": 10}),
    "WAVEFT": ("llama", "WaveFTConfig", {"target_modules": SOME, "n_frequency": 20, "scaling": 5.0}),
    "LN_TUNING": ("llama", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
}
SCALES = {"RANDLORA": 0.01, "FOURIERFT": 0.5, "PVERA": 0.5, "VBLORA": 0.5}
