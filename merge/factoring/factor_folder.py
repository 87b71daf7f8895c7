"""The factor folder: a PEFT LoRA (or DoRA) folder whose scale is 1, with row scales and full replacements beside it.

adapter_model.safetensors   base_model.model.<module>.lora_A.weight (R, in), .lora_B.weight (out, R), float32; with a
                            row scale .lora_magnitude_vector (out,) as well: PEFT loads it as DoRA
row_scale.safetensors       base_model.model.<module>.row_scale (out,) = m / rownorm(W0 + B A)
replacements.safetensors    <base tensor name> -> heads and biases that were trained whole

`factor` and `extract` both write it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.methods.adapter import Adapter
from adapter_merge.outputs.staging import write_json
from adapter_merge.storage.tensor_io import write_safetensors

from .weight_factors import Factored

ROW_SCALES = "row_scale.safetensors"


@dataclass(frozen=True, eq=False)
class WeightFactors:
    """W' = diag(s) (W0 + up down), s = magnitude / rownorm(W0 + up down); without a magnitude W0 + up down."""

    module: str
    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    magnitude: Tensor | None = None  # (out,); of an embedding (dim,)
    row_scale: Tensor | None = None  # (out,): s
    embedding: bool = False  # the weight is (vocabulary, dim), which PEFT keeps the other way round

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """By their names in adapter_model.safetensors."""
        stem = f"{PREFIX}{self.module}"
        if self.embedding:
            found = {f"{stem}.lora_embedding_A": self.up.T, f"{stem}.lora_embedding_B": self.down.T}
        else:
            found = {f"{stem}.lora_A.weight": self.down, f"{stem}.lora_B.weight": self.up}
        if self.magnitude is not None:
            found[f"{stem}.lora_magnitude_vector"] = self.magnitude
        return {name: tensor.contiguous().to(torch.float32) for name, tensor in found.items()}


@dataclass(frozen=True)
class FolderConfig:
    """What the folder says beside its tensors."""

    base_name: str | None
    task_type: str | None
    conv1d: bool = False
    targets: list[str] | str | None = None  # None: every module's own name
    saved: tuple[str, ...] = ()  # modules_to_save, as an adapter's own config says it
    tied: bool = False  # the head follows the embedding, as at training


def write_folder(
    folder: Path, factors: Sequence[WeightFactors], replacements: Mapping[str, Tensor], said: FolderConfig
) -> None:
    """Write config, factors, row scales and replacements into the empty `folder`."""
    tensors = {name: tensor for item in factors for name, tensor in item.tensors().items()}
    scales = {
        f"{PREFIX}{item.module}.row_scale": item.row_scale.to(torch.float32)
        for item in factors
        if item.row_scale is not None and not item.embedding
    }
    adapted = {item.module for item in factors}
    saved, bias = set(), "none"
    for name, tensor in replacements.items():
        module, _, kind = name.rpartition(".")
        if module in adapted:
            bias = "all" if bias == "all" else "lora_only"
            tensors[f"{PREFIX}{module}.base_layer.{kind}"] = tensor
            continue
        tensors[f"{PREFIX}{name}"] = tensor
        if kind == "bias" and f"{module}.weight" not in replacements:
            bias = "all"  # PEFT's name for biases that were trained without their weights
        else:
            saved.add(module)
    write_json(folder / "adapter_config.json", _config(factors, said, saved_modules(saved, said.saved), bias))
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if scales:
        write_safetensors(folder / ROW_SCALES, scales, {"format": "pt"})
    if replacements:
        write_safetensors(folder / REPLACEMENTS, dict(replacements), {"format": "pt"})


def write_factors(
    folder: Path,
    opened: Adapter,
    factored: Sequence[Factored],
    replacements: Mapping[str, Tensor],
    conv1d: bool,
) -> None:
    """The folder of an adapter's own factors."""
    embeddings = {module.name for module in opened.modules if module.embedding}
    factors = [
        WeightFactors(one.name, one.up, one.down, one.magnitude, one.row_scale, one.name in embeddings)
        for one in factored
    ]
    targets, task = opened.config.get("target_modules"), opened.config.get("task_type")
    said = FolderConfig(
        opened.base_name,
        task if isinstance(task, str) else None,
        conv1d,
        targets if isinstance(targets, list | str) and targets not in ("all-linear", "", []) else None,
        stated_modules(opened),
        opened.tied,
    )
    write_folder(folder, factors, replacements, said)


def stated_modules(opened: Adapter) -> tuple[str, ...]:
    """modules_to_save of the adapter's own config."""
    stated = opened.config.get("modules_to_save")
    return tuple(name for name in stated if isinstance(name, str)) if isinstance(stated, list) else ()


def saved_modules(replaced: Iterable[str], stated: Iterable[str]) -> list[str] | None:
    """modules_to_save for the module paths `replaced`: what was `stated`, and what that leaves out.

    A head of several layers is saved as one module (classifier, not classifier.dense): PEFT cannot load a part of it.
    """
    replaced, names = set(replaced), list(stated)
    uncovered = {module for module in replaced if not any(f".{name}." in f".{module}." for name in names)}
    return sorted({*names, *uncovered}) or None if replaced else None


def _config(
    factors: Sequence[WeightFactors], said: FolderConfig, modules_to_save: list[str] | None, bias: str
) -> dict[str, Any]:
    """adapter_config.json: alpha == rank everywhere, so that the scale is 1; other ranks stand in the patterns."""
    ranks = {item.module: item.rank for item in factors}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": said.base_name,
        "task_type": said.task_type,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks) if said.targets is None else said.targets,
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": said.conv1d,
        "use_rslora": False,
        "use_dora": any(item.magnitude is not None for item in factors),
        "init_lora_weights": True,
        "modules_to_save": modules_to_save,
        **({"ensure_weight_tying": True} if said.tied else {}),
    }
