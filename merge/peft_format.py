"""PEFT adapter folders: adapter_config.json + adapter_model.safetensors (or .bin, read without running code).

Tensor names follow PEFT 0.21: base_model.model.<module>.<role>, the roles of each method in lora_format.py and
lycoris_format.py; anything else that is saved (modules_to_save, biases) carries the base tensor's own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .checkpoint import read_json, read_weights
from .errors import AdapterError, Problem, UnsupportedError, raise_all
from .headers import TensorRef

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
CONVERTED_NOTE = (
    "this folder is what PEFT's save_as_lora made of another adapter, cut to a rank. If that was a DoRA or DuDe, its "
    "magnitudes and its residual were dropped, and nothing in the folder says so: use the original folder "
    "(adapter-merge factor --rank R cuts it to a rank with its error stated)"
)


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


def read_peft(folder: Path, extras: PeftExtras | None = None) -> Adapter:
    """The adapter in `folder`. Raises AdapterError with every problem, UnsupportedError for methods not known here."""
    from .lora_format import ADALORA_ROLES, LORA_ROLES, TOKEN_ROLES, read_adalora, read_lora, read_tokens
    from .lycoris_format import LOHA_ROLES, LOKR_ROLES, VERA_ROLES, read_loha, read_lokr, read_vera

    readers = {
        "LORA": (LORA_ROLES, read_lora),
        "ADALORA": (ADALORA_ROLES, read_adalora),
        "LOKR": (LOKR_ROLES, read_lokr),
        "LOHA": (LOHA_ROLES, read_loha),
        "VERA": (VERA_ROLES, read_vera),
        "TRAINABLE_TOKENS": (TOKEN_ROLES, read_tokens),
    }
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    weights = find_weights(folder)
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights", expected=" or ".join(WEIGHT_FILES))
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in readers:
        raise UnsupportedError(
            f"{config_file}: peft_type {kind!r} is not supported",
            expected=f"{', '.join(readers)}, DCFT, DUDE or LYCORIS",
        )
    fan_in_fan_out = config.get("fan_in_fan_out", False)
    base_name = config.get("base_model_name_or_path")
    if not isinstance(fan_in_fan_out, bool | None):
        got = f"{fan_in_fan_out!r:.100}"
        raise AdapterError(f"{config_file}: fan_in_fan_out is wrong", expected="true or false", got=got)
    roles, read = readers[kind]
    shard = read_weights(weights)
    parts = group_tensors(shard.tensors, weights, roles)
    method, modules = read(parts, config, extras or PeftExtras())
    raise_all(parts.problems, AdapterError)
    return Adapter(
        folder=folder,
        format="PEFT folder",
        method=method,
        modules=modules,
        replacements=parts.replacements,
        config=config,
        base_name=base_name if isinstance(base_name, str) else None,
        fan_in_fan_out=bool(fan_in_fan_out),
        files=(config_file, weights),
        notes=(CONVERTED_NOTE,) if is_converted(config, weights, shard.metadata) else (),
        base_layers=parts.base_layers,
        tied=bool(config.get("ensure_weight_tying")),
    )


def is_converted(config: Mapping[str, Any], weights: Path, metadata: Mapping[str, str]) -> bool:
    """True for what PEFT's save_as_lora wrote (peft.tuners.lora.conversion).

    It leaves marks that no training does: its config is saved with inference_mode false and exclude_modules as an
    empty list, every alpha equals its rank, and its safetensors file lacks the metadata that save_pretrained writes.
    """
    return (
        config.get("peft_type") == "LORA"
        and config.get("exclude_modules") == []
        and config.get("inference_mode") is False
        and config.get("r") == config.get("lora_alpha")
        and config.get("rank_pattern") == config.get("alpha_pattern")
        and config.get("bias") == "none"
        and weights.suffix == ".safetensors"
        and "format" not in metadata
    )


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
