"""PEFT adapter folders: adapter_config.json + adapter_model.safetensors (or .bin, read without running code).

Tensor names follow PEFT 0.21: base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r),
.lora_magnitude_vector (out,), .lora_embedding_A (r, vocabulary), .lora_embedding_B (dim, r); anything else that
is saved (modules_to_save, biases) carries the base tensor's own name. rank_pattern and alpha_pattern are matched
as PEFT does (peft.utils.other.get_pattern_key): a regular expression over whole trailing path components.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .adapter import AdaptedModule, Adapter
from .checkpoint import read_json, read_weights
from .dude import Initial
from .errors import AdapterError, Problem, UnsupportedError, raise_all
from .headers import TensorRef
from .lora import LoraModule, lora_scale

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_A_init.weight": "A0",
    "lora_B_init.weight": "B0",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_embedding_A": "EA",
    "lora_embedding_B": "EB",
}
ROLE = re.compile(r"(?P<module>.+)\.(?P<role>" + "|".join(map(re.escape, ROLES)) + ")")
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "true", None)
REFUSED_SETTINGS = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (its delta depends on the prompt)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "trainable_token_indices": "trainable token indices",
    "target_parameters": "LoRA on bare parameters",
    "lora_bias": "a trained bias inside lora_B",
}


def find_weights(folder: Path) -> Path | None:
    """The adapter's weights file, safetensors first; None where there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key of rank_pattern / alpha_pattern that matches the end of the module's path."""
    for key, value in pattern.items():
        if re.match(rf"(?:.*\.)?(?:{key})$", module):
            return value
    return default


def read_peft(folder: Path) -> Adapter:
    """The LoRA-family adapter in `folder`. Raises AdapterError with every problem, UnsupportedError for other kinds."""
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    weights = find_weights(folder)
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights", expected=" or ".join(WEIGHT_FILES))
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{config_file}: peft_type {config.get('peft_type')!r} is not supported",
            expected="LORA, DCFT or DUDE",
        )
    refused = [
        Problem(f"{config_file}: {key} is set: {meaning} cannot be merged here", got=repr(config[key]))
        for key, meaning in REFUSED_SETTINGS.items()
        if config.get(key)
    ]
    raise_all(refused, UnsupportedError)
    shard = read_weights(weights)
    groups, replacements, problems = group_tensors(shard.tensors, weights)
    principal = starts_from_base(config, config_file)
    modules, found = lora_modules(groups, config, weights, Initial() if principal else None)
    raise_all(problems + found, AdapterError)
    return Adapter(
        folder=folder,
        format="PEFT folder",
        method=method_name(config, principal),
        modules=modules,
        replacements=replacements,
        config=config,
        base_name=config.get("base_model_name_or_path"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        files=(config_file, weights),
    )


def method_name(config: Mapping[str, Any], principal: bool) -> str:
    """What to call a LoRA-family adapter."""
    if config.get("use_dora"):
        return "DuDe" if principal else "DoRA"
    if principal:
        return "PiSSA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def starts_from_base(config: Mapping[str, Any], config_file: Path) -> bool:
    """True for PiSSA initialisation: the adapter was trained beside a residual of the base.

    Raises UnsupportedError where that residual cannot be found again from the base alone.
    """
    init = config.get("init_lora_weights", True)
    if init in PLAIN_INITS:
        return False
    if init == "pissa":
        return True
    if isinstance(init, str) and init.startswith("pissa_niter_"):
        raise UnsupportedError(
            f"{config_file}: init_lora_weights {init!r} used a randomised SVD, which cannot be repeated",
            expected="the factors at initialisation, or the residual base",
            hint="pass --init-adapter FOLDER (saved before training), or merge on the residual base "
            "with --base-kind residual",
        )
    raise UnsupportedError(
        f"{config_file}: init_lora_weights {init!r} changed the base at training and is not known here",
        expected="true, gaussian, eva, orthogonal, pissa",
    )


def group_tensors(
    refs: tuple[TensorRef, ...], weights: Path
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef], list[Problem]]:
    """Tensors by module and role, full replacements by base tensor name, and what is wrong with the names."""
    groups: dict[str, dict[str, TensorRef]] = {}
    replacements: dict[str, TensorRef] = {}
    problems: list[Problem] = []
    for ref in refs:
        name = ref.name.removeprefix(PREFIX)
        match = ROLE.fullmatch(name)
        if name == ref.name:
            problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=f"a name under {PREFIX}"))
        elif match:
            groups.setdefault(match["module"], {})[ROLES[match["role"]]] = ref
        elif ".lora_" in name or ".original_module." in name:
            if ".original_module." not in name:  # PEFT saves the untouched original beside a trained copy
                problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=", ".join(ROLES)))
        else:
            target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            # bias="all" saves both classifier.bias and classifier.modules_to_save.bias: the trained copy counts.
            if target not in replacements or ".modules_to_save." in name:
                replacements[target] = ref
    return groups, replacements, problems


def lora_modules(
    groups: Mapping[str, Mapping[str, TensorRef]],
    config: Mapping[str, Any],
    weights: Path,
    initial: Initial | None,
) -> tuple[tuple[AdaptedModule, ...], list[Problem]]:
    """The modules of a LoRA-family adapter, and everything that is wrong with them."""
    modules: list[AdaptedModule] = []
    problems: list[Problem] = []
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    rank_pattern = config.get("rank_pattern") or {}
    alpha_pattern = config.get("alpha_pattern") or {}
    if not isinstance(rank, int) or rank < 1:
        problems.append(Problem(f"{weights.parent}: r is missing or wrong in the config", "a rank >= 1", repr(rank)))
        rank = 1
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        problems.append(
            Problem(
                f"{weights.parent}: lora_alpha is missing or wrong in the config",
                "the number that was trained with",
                repr(alpha),
                "the scale is alpha / r: it must be known, a guess would merge a wrong adapter",
            )
        )
        alpha = 1.0
    for name, group in sorted(groups.items()):
        embedding = "EA" in group or "EB" in group
        a, b = (group.get("EA"), group.get("EB")) if embedding else (group.get("A"), group.get("B"))
        if a is None or b is None:
            problems.append(Problem(f"{weights}: {name} has only one of its two factors"))
            continue
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            problems.append(
                Problem(
                    f"{weights}: the factors of {name} do not fit",
                    "A (r, in), B (out, r)",
                    f"A {a.shape}, B {b.shape}",
                )
            )
            continue
        said = pattern_value(rank_pattern, name, rank)
        if said != a.shape[0]:
            problems.append(
                Problem(f"{weights}: the rank of {name} is not the config's", f"r = {said}", f"r = {a.shape[0]}")
            )
            continue
        scale = lora_scale(float(pattern_value(alpha_pattern, name, alpha)), a.shape[0], bool(config.get("use_rslora")))
        magnitude = group.get("m")
        module = LoraModule(name, a, b, scale, magnitude=magnitude, initial=initial, embedding=embedding)
        if "A0" in group and "B0" in group:
            if group["A0"].shape != a.shape or group["B0"].shape != b.shape:
                problems.append(Problem(f"{weights}: the initial factors of {name} do not fit the trained ones"))
            if initial is not None:
                module = replace(module, initial=Initial(group["A0"], group["B0"], initial.dtype))
        problems += _magnitude_problems(module, bool(config.get("use_dora")), weights)
        modules.append(module)
    if not groups:
        problems.append(Problem(f"{weights}: holds no adapter factors"))
    return tuple(modules), problems


def _magnitude_problems(module: LoraModule, use_dora: bool, weights: Path) -> list[Problem]:
    magnitude = module.magnitude
    if use_dora and magnitude is None:
        return [
            Problem(
                f"{weights}: {module.name} has no magnitude vector although use_dora is set",
                expected=f"{PREFIX}{module.name}.lora_magnitude_vector",
                hint="PEFT drops the magnitudes when it saves with path_initial_model_for_weight_conversion: "
                "save the adapter again without that option",
            )
        ]
    if not use_dora and magnitude is not None:
        return [Problem(f"{weights}: {module.name} has a magnitude vector although use_dora is not set")]
    if magnitude is not None and (module.embedding or magnitude.shape != (module.shape[0],)):
        return [
            Problem(
                f"{weights}: the magnitude of {module.name} does not fit",
                f"({module.shape[0]},)",
                str(magnitude.shape),
            )
        ]
    return []
