"""LoRA files of diffusers (pytorch_lora_weights.safetensors): PEFT's factors of a pipeline's parts in one file.

<component>.<module>.lora_A.weight (r, in), .lora_B.weight (out, r), .lora_magnitude_vector; component: unet,
transformer, text_encoder, ... The header's metadata hold PEFT's config of each component as JSON
(lora_adapter_metadata, keys <component>.r and so on). Files without it have the scale 1, as diffusers loads them, or
<component>.<module>.alpha.
Source: save_lora_weights and load_lora_weights of diffusers.loaders (0.42).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, FileFormatError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.peft.known_settings import PEFT_SETTINGS
from adapter_merge.formats.peft.lora import LORA_ROLES, read_lora
from adapter_merge.formats.peft.tensors import PREFIX, PeftExtras, group_tensors
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat
from adapter_merge.storage.checkpoint import Checkpoint, read_weights
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .components import COMPONENTS, component_of, others_note

METADATA = "lora_adapter_metadata"
FACTOR = ".lora_A.weight"


def holds_diffusers(names: tuple[str, ...]) -> bool:
    """Return True when PEFT's factors stand under the names of a pipeline's components."""
    return any(name.endswith(FACTOR) and name.partition(".")[0] in COMPONENTS for name in names)


def read_diffusers(file: Path, base: Checkpoint | None) -> Adapter:
    """Read the modules of the component that `base` is; without it those of the only one, or of all, with its name.

    Raises AdapterError with every problem, UnsupportedError for settings of a component that are not supported.
    """
    shard = read_weights(file)
    held: dict[str, list[TensorRef]] = {}
    problems: list[Problem] = []
    for ref in shard.tensors:
        component, _, _ = ref.name.partition(".")
        held.setdefault(component, []).append(ref)
        if component not in COMPONENTS:
            problems.append(Problem(f"{file}: unknown tensor {ref.name!r}", f"a name under {', '.join(COMPONENTS)}"))
    raise_all(problems, AdapterError)
    counts = {name: sum(ref.name.endswith(FACTOR) for ref in refs) for name, refs in held.items()}
    chosen: list[str | None] = [*held] if base is None else [component_of(base, held)]
    configs = _configs(shard.metadata, file)
    modules: list[AdaptedModule] = []
    methods: set[str] = set()
    for name in chosen:
        if name is None:
            raise AdapterError(
                f"{file}: holds no modules of this base",
                expected="a folder of the pipeline that it was trained on, such as PIPELINE/unet",
                got=", ".join(f"{count} modules of {name}" for name, count in counts.items()),
            )
        method, found = _component(name, held[name], configs, file, keep_name=len(chosen) > 1)
        methods.add(method)
        modules += found
    return Adapter(
        folder=file.parent,
        format=AdapterFormat.DIFFUSERS,
        method=" and ".join(sorted(methods)),
        modules=tuple(modules),
        replacements={},
        config={},
        base_name=None,
        files=(file,),
        notes=others_note(counts, chosen[0] if base is not None else None),
    )


def _component(
    component: str, refs: list[TensorRef], configs: Mapping[str, Mapping[str, Any]], file: Path, keep_name: bool
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Return method and modules of one component."""
    start = "" if keep_name else f"{component}."
    alphas = {ref.name[: -len(".alpha")]: ref for ref in refs if ref.name.endswith(".alpha")}
    named = [replace(ref, name=PREFIX + ref.name.removeprefix(start)) for ref in refs if ref not in alphas.values()]
    tensors = group_tensors(tuple(named), file, LORA_ROLES)
    for name in tensors.replacements:
        tensors.problems.append(Problem(f"{file}: unknown tensor {component}.{name!r}", ", ".join(LORA_ROLES)))
    config = configs.get(component)
    if config is None:
        ranks = {name: group["A"].shape[0] for name, group in tensors.groups.items() if group.get("A")}
        stated = {
            name.removeprefix(start): float(read_tensor(ref).reshape(-1)[0]) for name, ref in alphas.items()
        }  # one number each
        dora = any("m" in group for group in tensors.groups.values())
        pattern: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": {**ranks, **stated}}
        config = {"r": max([1, *ranks.values()]), "lora_alpha": max([1, *ranks.values()]), "use_dora": dora, **pattern}
    elif alphas:
        tensors.problems.append(Problem(f"{file}: {component} has both alphas and {METADATA}"))
    unsupported, _ = PEFT_SETTINGS["LORA"].check(config, f"{file}: {METADATA} of {component}")
    raise_all(unsupported, UnsupportedError)
    method, modules = read_lora(tensors, config, PeftExtras())
    raise_all(tensors.problems, AdapterError)
    return method, modules


def _configs(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """Return PEFT's config of every component, from the header."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: {METADATA} is not JSON ({error})") from error
    if not isinstance(flat, dict):
        raise FileFormatError(f"{file}: {METADATA} is not a JSON object", got=type(flat).__name__)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    return configs
