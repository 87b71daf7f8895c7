"""Factors that were computed here, written as a PEFT folder: a LoRA, or a DoRA where there are magnitudes; scale 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .output import write_json
from .peft_format import PREFIX
from .tensors import write_safetensors


@dataclass(frozen=True, eq=False)
class FoundFactors:
    """W' ~ diag(m / rownorm(W0 + up down)) (W0 + up down), or W0 + up down without a magnitude."""

    module: str
    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    magnitude: Tensor | None  # (out,)
    relative_error: float  # ||dW - what the factors give|| / ||dW||
    embedding: bool = False  # the weight is (vocabulary, dim)

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def write_lora_folder(
    folder: Path,
    factors: Sequence[FoundFactors],
    replacements: Mapping[str, Tensor],
    base_name: str | None,
    task_type: str | None,
    conv1d: bool,
) -> None:
    """adapter_config.json and adapter_model.safetensors in `folder`; ranks that differ stand in the patterns."""
    scaled = any(item.magnitude is not None for item in factors)
    ranks = Counter(item.rank for item in factors)
    common = ranks.most_common(1)[0][0] if ranks else 1
    pattern = {item.module: item.rank for item in factors if item.rank != common}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "task_type": task_type,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(item.module for item in factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "use_dora": scaled,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in replacements}) or None,
    }
    tensors: dict[str, Tensor] = {}
    for item in factors:
        stem = f"{PREFIX}{item.module}"
        if item.embedding:
            tensors[f"{stem}.lora_embedding_A"] = item.up.T.contiguous().to(torch.float32)
            tensors[f"{stem}.lora_embedding_B"] = item.down.T.contiguous().to(torch.float32)
        else:
            tensors[f"{stem}.lora_A.weight"] = item.down.contiguous().to(torch.float32)
            tensors[f"{stem}.lora_B.weight"] = item.up.contiguous().to(torch.float32)
        if item.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = item.magnitude.to(torch.float32)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in replacements.items()}
    write_json(folder / "adapter_config.json", config)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
