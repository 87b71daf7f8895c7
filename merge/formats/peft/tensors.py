"""The weights file of a PEFT folder, its tensors by module and role, and checked numbers of its config.

Tensor names follow PEFT 0.21: base_model.model.<module>.<role>; anything else that is saved (modules_to_save, biases)
carries the base tensor's own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.storage.safetensors_header import TensorRef

# Files that a factor folder holds beside the adapter's weights.
REPLACEMENTS = "replacements.safetensors"

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftExtras:
    """Files and values that a user states where a PEFT folder does not hold them."""

    magnitudes: Path | None = None  # a safetensors or .bin file, or another PEFT folder, with the magnitude vectors
    init_adapter: Path | None = None  # a PEFT folder with the factors as they were before training
    residual_dtype: str | None = None  # float32, bfloat16 or float16: the dtype of the frozen residual


@dataclass
class PeftTensors:
    """The tensors of a PEFT folder, sorted by use, and the problems found while they are read."""

    weights: Path
    groups: dict[str, dict[str, TensorRef]] = field(default_factory=dict)  # module -> role -> factor
    replacements: dict[str, TensorRef] = field(default_factory=dict)  # base tensor name -> tensor trained in full
    base_layers: dict[str, TensorRef] = field(default_factory=dict)  # base tensor name -> base weight saved beside it
    biases: dict[str, bool] = field(default_factory=dict)  # module -> True where its bias is saved as a base layer's
    problems: list[Problem] = field(default_factory=list)


def find_weights(folder: Path) -> Path | None:
    """Return the weights file in `folder`, safetensors before .bin; None where there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def group_tensors(refs: tuple[TensorRef, ...], weights: Path, roles: Mapping[str, str]) -> PeftTensors:
    """Sort the tensors of a PEFT weights file by `roles` (name suffix -> role).

    Each tensor becomes a factor, a replacement, a base layer or a problem; copies of untouched originals are skipped.
    """
    tensors = PeftTensors(weights)
    by_length = sorted(roles, key=len, reverse=True)
    factor_markers = tuple(f".{role.split('.', 1)[0]}" for role in roles if not role.startswith("token_adapter."))
    for ref in refs:
        name = ref.name.removeprefix(PREFIX)
        role = next((r for r in by_length if name.endswith("." + r)), None)
        if name == ref.name:
            shared = ref.name.removeprefix("base_model.")
            if shared in roles:
                tensors.groups.setdefault("", {})[roles[shared]] = ref
            else:
                tensors.problems.append(
                    Problem(f"{weights}: unknown tensor {ref.name!r}", expected=f"a name under {PREFIX}")
                )
        elif role is not None:
            tensors.groups.setdefault(name[: -len(role) - 1], {})[roles[role]] = ref
        elif ".original_module." in name:
            continue  # PEFT saves the untouched original beside a trained copy
        elif any(marker in name for marker in factor_markers) or ".lora_" in name:
            tensors.problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=", ".join(roles)))
        else:
            target = name.replace(".token_adapter.", ".").replace(".modules_to_save.", ".")
            if ".base_layer." in target and target.endswith(".weight"):
                tensors.base_layers[target.replace(".base_layer.", ".")] = ref
                continue
            if target.endswith(".bias") and ".modules_to_save." not in name:
                tensors.biases[target.removesuffix(".bias").removesuffix(".base_layer")] = ".base_layer." in target
            target = target.replace(".base_layer.", ".")
            # bias="all" saves both classifier.bias and classifier.modules_to_save.bias: the trained copy counts.
            if target not in tensors.replacements or ".modules_to_save." in name:
                tensors.replacements[target] = ref
    for name in tensors.base_layers.keys() & tensors.replacements.keys():
        del tensors.base_layers[name]
    return tensors


def read_number(config: Mapping[str, Any], key: str, tensors: PeftTensors, hint: str | None = None) -> float:
    """Return the number `key` of the config; where it is missing, zero or not finite, add a problem and return 1."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e12:
        tensors.problems.append(
            Problem(
                f"{tensors.weights.parent}: {key} is missing or wrong in the config",
                "the number used at training",
                repr(value)[:100],
                hint,
            )
        )
        return 1.0
    return float(value)


def read_rank(config: Mapping[str, Any], key: str, tensors: PeftTensors) -> int:
    """Return the rank `key` of the config; where it is not a whole number >= 1, add a problem and return 1."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        tensors.problems.append(
            Problem(
                f"{tensors.weights.parent}: {key} is missing or wrong in the config",
                "a rank >= 1",
                f"{value!r:.100}",
            )
        )
        return 1
    return value


def read_flag(config: Mapping[str, Any], key: str, tensors: PeftTensors) -> bool:
    """Return the boolean `key` of the config, False where it is missing; add a problem where it is not a boolean."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        tensors.problems.append(
            Problem(f"{tensors.weights.parent}: {key} is wrong in the config", "true or false", repr(value)[:100])
        )
    return value is True


def require_factors(modules: Sequence[AdaptedModule], tensors: PeftTensors) -> None:
    """Add a problem where a folder without other problems has no adapted module."""
    if not modules and not tensors.problems:
        tensors.problems.append(Problem(f"{tensors.weights}: holds no adapter factors"))
