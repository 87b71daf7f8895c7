"""The files and tensors of a PEFT folder: found, sorted by module and role, and the config's numbers, checked.

Tensor names follow PEFT 0.21: base_model.model.<module>.<role>; anything else that is saved (modules_to_save, biases)
carries the base tensor's own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_merge.errors import Problem
from adapter_merge.storage.safetensors_header import TensorRef

# Files that a factor folder holds beside the adapter's weights.
REPLACEMENTS = "replacements.safetensors"

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftExtras:
    """What a user may add to a PEFT folder that does not hold everything."""

    magnitudes: Path | None = None  # a safetensors or .bin file, or another PEFT folder, with the magnitude vectors
    init_adapter: Path | None = None  # a PEFT folder with the factors as they were before training
    residual_dtype: str | None = None  # float32, bfloat16 or float16: what the frozen residual was kept in


@dataclass
class Parts:
    """A PEFT folder's tensors, sorted: groups by module and role, replacements and base layers by base tensor name."""

    weights: Path
    groups: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    replacements: dict[str, TensorRef] = field(default_factory=dict)
    base_layers: dict[str, TensorRef] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def find_weights(folder: Path) -> Path | None:
    """The adapter's weights file, safetensors first; None where there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def group_tensors(refs: tuple[TensorRef, ...], weights: Path, roles: Mapping[str, str]) -> Parts:
    """Sort a PEFT file's tensors. Every one is a factor, a replacement or a problem."""
    parts = Parts(weights)
    by_length = sorted(roles, key=len, reverse=True)
    own = tuple(f".{role.split('.', 1)[0]}" for role in roles if not role.startswith("token_adapter."))
    for ref in refs:
        name = ref.name.removeprefix(PREFIX)
        role = next((r for r in by_length if name.endswith("." + r)), None)
        if name == ref.name:
            shared = ref.name.removeprefix("base_model.")
            if shared in roles:
                parts.groups.setdefault("", {})[roles[shared]] = ref
            else:
                parts.problems.append(
                    Problem(f"{weights}: unknown tensor {ref.name!r}", expected=f"a name under {PREFIX}")
                )
        elif role is not None:
            parts.groups.setdefault(name[: -len(role) - 1], {})[roles[role]] = ref
        elif ".original_module." in name:
            continue  # PEFT saves the untouched original beside a trained copy
        elif any(marker in name for marker in own) or ".lora_" in name:
            parts.problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=", ".join(roles)))
        else:
            target = name.replace(".token_adapter.", ".").replace(".modules_to_save.", ".")
            if ".base_layer." in target and target.endswith(".weight"):
                parts.base_layers[target.replace(".base_layer.", ".")] = ref
                continue
            target = target.replace(".base_layer.", ".")
            # bias="all" saves both classifier.bias and classifier.modules_to_save.bias: the trained copy counts.
            if target not in parts.replacements or ".modules_to_save." in name:
                parts.replacements[target] = ref
    for name in parts.base_layers.keys() & parts.replacements.keys():
        del parts.base_layers[name]
    return parts


def number(config: Mapping[str, Any], key: str, parts: Parts, hint: str | None = None) -> float:
    """A positive, finite number of the config; 1 and a problem where it is not there."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e12:
        parts.problems.append(
            Problem(
                f"{parts.weights.parent}: {key} is missing or wrong in the config",
                "the number that was trained with",
                repr(value)[:100],
                hint,
            )
        )
        return 1.0
    return float(value)


def rank_of(config: Mapping[str, Any], key: str, parts: Parts) -> int:
    """A rank of the config; 1 and a problem where it is not one."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        parts.problems.append(
            Problem(
                f"{parts.weights.parent}: {key} is missing or wrong in the config", "a rank >= 1", f"{value!r:.100}"
            )
        )
        return 1
    return value


def flag(config: Mapping[str, Any], key: str, parts: Parts) -> bool:
    """A true or false of the config, false where it is not stated."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        parts.problems.append(
            Problem(f"{parts.weights.parent}: {key} is wrong in the config", "true or false", repr(value)[:100])
        )
    return value is True
