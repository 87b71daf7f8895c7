"""PEFT adapter folders: adapter_config.json + adapter_model.safetensors (or .bin, read without running code).

Tensor names follow PEFT 0.21: base_model.model.<module>.<role>, the roles of each method in lora.py and
lycoris.py; anything else that is saved (modules_to_save, biases) carries the base tensor's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.known_settings import KnownSettings, describe_off_settings
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat
from adapter_merge.storage.checkpoint import read_json, read_weights

from .known_settings import BIASES, PEFT_SETTINGS
from .layer_types import LAYER_TYPES, REFUSED_TYPES, REPLACED_TYPES, read_layer_type
from .lora import ADALORA_ROLES, LORA_ROLES, TOKEN_ROLES, read_adalora, read_lora, read_tokens
from .lycoris import LOHA_ROLES, LOKR_ROLES, VERA_ROLES, read_loha, read_lokr, read_vera
from .targeting import check_targets
from .tensors import WEIGHT_FILES, PeftExtras, PeftTensors, find_weights, group_tensors

CONVERTED_NOTE = (
    "PEFT's save_as_lora made this folder from another adapter, truncated to a rank. If that was a DoRA or DuDe, its "
    "magnitudes and its residual were dropped, which the folder does not state: use the original folder "
    "(adapter-merge factor --rank R cuts it to a rank with its error stated)"
)


@dataclass(frozen=True)
class PeftMethod:
    """How the folder of one PEFT method is read."""

    roles: Mapping[str, str]  # suffix of a tensor's name -> role
    settings: KnownSettings  # the keys of its config
    read: Callable[[PeftTensors, Mapping[str, Any], PeftExtras], tuple[str, tuple[AdaptedModule, ...]]]


# peft_type -> how it is read. A new PEFT method adds one row.
METHODS = {
    "LORA": PeftMethod(LORA_ROLES, PEFT_SETTINGS["LORA"], read_lora),
    "ADALORA": PeftMethod(ADALORA_ROLES, PEFT_SETTINGS["ADALORA"], read_adalora),
    "LOKR": PeftMethod(LOKR_ROLES, PEFT_SETTINGS["LOKR"], read_lokr),
    "LOHA": PeftMethod(LOHA_ROLES, PEFT_SETTINGS["LOHA"], read_loha),
    "VERA": PeftMethod(VERA_ROLES, PEFT_SETTINGS["VERA"], read_vera),
    "TRAINABLE_TOKENS": PeftMethod(TOKEN_ROLES, PEFT_SETTINGS["TRAINABLE_TOKENS"], read_tokens),
}


def read_peft(folder: Path, extras: PeftExtras | None = None) -> Adapter:
    """Read the adapter in `folder`. Raises AdapterError with every problem, UnsupportedError for unknown methods."""
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    weights = find_weights(folder)
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights", expected=" or ".join(WEIGHT_FILES))
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        kind = repr(kind)[:100]  # in no table
    if kind in LAYER_TYPES or kind in REPLACED_TYPES:
        return read_layer_type(folder, config, weights, config_file)
    if kind in REFUSED_TYPES:
        raise UnsupportedError(f"{config_file}: peft_type {kind!r} is not supported", got=REFUSED_TYPES[kind])
    if kind not in METHODS:
        raise UnsupportedError(
            f"{config_file}: peft_type {kind!r} is not supported",
            expected=f"{', '.join((*METHODS, *LAYER_TYPES, *REPLACED_TYPES))}, DCFT, DUDE or LYCORIS",
        )
    method_entry = METHODS[kind]
    unsupported, off = method_entry.settings.check(config, str(config_file))
    if config.get("bias") not in BIASES:
        unsupported.append(
            Problem(f"{config_file}: bias is wrong", ", ".join(map(repr, BIASES)), f"{config['bias']!r:.100}")
        )
    raise_all(unsupported, UnsupportedError)
    fan_in_fan_out = config.get("fan_in_fan_out", False)
    base_name = config.get("base_model_name_or_path")
    if not isinstance(fan_in_fan_out, bool | None):
        stated_value = f"{fan_in_fan_out!r:.100}"
        raise AdapterError(f"{config_file}: fan_in_fan_out is wrong", expected="true or false", got=stated_value)
    shard = read_weights(weights)
    tensors = group_tensors(shard.tensors, weights, method_entry.roles)
    method, modules = method_entry.read(tensors, config, extras or PeftExtras())
    raise_all(tensors.problems, AdapterError)
    return Adapter(
        folder=folder,
        format=AdapterFormat.PEFT,
        method=method,
        modules=modules,
        replacements=tensors.replacements,
        config=config,
        base_name=base_name if isinstance(base_name, str) else None,
        fan_in_fan_out=bool(fan_in_fan_out),
        files=(config_file, weights),
        notes=(
            *((CONVERTED_NOTE,) if is_converted(config, weights, shard.metadata) else ()),
            *describe_off_settings(off, str(config_file)),
        ),
        base_layers=tensors.base_layers,
        tied=bool(config.get("ensure_weight_tying")),
        contradictions=check_targets(config, tensors),
    )


def is_converted(config: Mapping[str, Any], weights: Path, metadata: Mapping[str, str]) -> bool:
    """Return True for a folder that PEFT's save_as_lora wrote (peft.tuners.lora.conversion).

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
