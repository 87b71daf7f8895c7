"""The factor folder: a PEFT LoRA (or DoRA) folder whose scale is 1, with row scales and full replacements beside it.

adapter_model.safetensors   base_model.model.<module>.lora_A.weight (R, in), .lora_B.weight (out, R), float32; with a
                            row scale .lora_magnitude_vector (out,) as well: PEFT loads it as DoRA
row_scale.safetensors       base_model.model.<module>.row_scale (out,) = m / rownorm(W0 + B A)
replacements.safetensors    <base tensor name> -> heads and biases that were trained whole
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .factorisation import Factored
from .headers import TensorRef
from .lora import LoraModule
from .output import write_json
from .peft_format import PREFIX
from .tensors import read_tensor, write_safetensors

ROW_SCALES = "row_scale.safetensors"
REPLACEMENTS = "replacements.safetensors"


def write_factors(
    folder: Path,
    opened: Adapter,
    factored: Sequence[Factored],
    replacements: Mapping[str, TensorRef],
    conv1d: bool,
) -> None:
    """Write config, factors, row scales and replacements into the empty `folder`."""
    scaled = any(one.magnitude is not None for one in factored)
    embeddings = {module.name for module in opened.modules if isinstance(module, LoraModule) and module.embedding}
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for one in factored:
        if one.name in embeddings:  # PEFT keeps an embedding's factors the other way round
            tensors[f"{PREFIX}{one.name}.lora_embedding_A"] = one.up.T.contiguous()
            tensors[f"{PREFIX}{one.name}.lora_embedding_B"] = one.down.T.contiguous()
            continue
        tensors[f"{PREFIX}{one.name}.lora_A.weight"] = one.down
        tensors[f"{PREFIX}{one.name}.lora_B.weight"] = one.up.contiguous()
        if one.magnitude is not None:
            assert one.row_scale is not None
            tensors[f"{PREFIX}{one.name}.lora_magnitude_vector"] = one.magnitude
            scales[f"{PREFIX}{one.name}.row_scale"] = one.row_scale
    adapted = {one.name for one in factored}
    heads = {name: read_tensor(ref) for name, ref in replacements.items()}
    saved, bias = set(), "none"
    for name, tensor in heads.items():
        module, _, kind = name.rpartition(".")
        if module in adapted:
            bias = "all" if bias == "all" else "lora_only"
            tensors[f"{PREFIX}{module}.base_layer.{kind}"] = tensor
            continue
        tensors[f"{PREFIX}{name}"] = tensor
        if kind == "bias" and f"{module}.weight" not in heads:
            bias = "all"  # PEFT's name for biases that were trained without their weights
        else:
            saved.add(module)
    config = peft_config(opened, factored, scaled, saved_modules(saved, opened), bias, conv1d)
    write_json(folder / "adapter_config.json", config)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if scales:
        write_safetensors(folder / ROW_SCALES, scales, {"format": "pt"})
    if heads:
        write_safetensors(folder / REPLACEMENTS, heads, {"format": "pt"})


def saved_modules(replaced: set[str], opened: Adapter) -> list[str] | None:
    """modules_to_save for the module paths `replaced`: what the adapter's own config says, and what that leaves out.

    A head of several layers is saved as one module (classifier, not classifier.dense): PEFT cannot load a part of it.
    """
    stated = opened.config.get("modules_to_save")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    uncovered = {module for module in replaced if not any(f".{name}." in f".{module}." for name in names)}
    return sorted({*names, *uncovered}) or None if replaced else None


def peft_config(
    opened: Adapter,
    factored: Sequence[Factored],
    scaled: bool,
    modules_to_save: list[str] | None,
    bias: str,
    conv1d: bool,
) -> dict[str, Any]:
    """adapter_config.json of the factors: alpha == rank everywhere, so that the scale is 1."""
    ranks = {one.name: one.down.shape[0] for one in factored}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    targets = opened.config.get("target_modules")
    if not isinstance(targets, list | str) or targets in ("all-linear", "", []):
        targets = sorted(ranks)
    tied = {"ensure_weight_tying": True} if opened.tied else {}  # the head follows the embedding, as at training
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": opened.base_name,
        "task_type": opened.config.get("task_type"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "use_dora": scaled,
        "init_lora_weights": True,
        "modules_to_save": modules_to_save,
        **tied,
    }
