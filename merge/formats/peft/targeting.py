"""Comparison of the modules that a PEFT config adapts with those that the weights file has tensors for.

PEFT creates its layers from the config and does not load any other tensor of the file, with a warning at most
(peft.tuners.tuners_utils.check_target_module_exists; 0.21): such a tensor has no effect when PEFT runs the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapter_merge.errors import Problem

from .patterns import pattern_fault
from .tensors import PeftTensors

ALL_LINEAR = "all-linear"
# Modules that `all-linear` leaves out: output heads, classifiers, and embeddings, which are no linear layers.
NOT_LINEAR = ["lm_head", "embed_out", "score", "classifier", "embed_tokens", "wte", "embed_in", "word_embeddings"]
IN_A_LAYER = re.compile(r"\.\d+\.")
FIRST_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."  # of a layer: the first number after two names


def check_targets(config: Mapping[str, Any], tensors: PeftTensors) -> tuple[Problem, ...]:
    """Return the contradiction where the file holds factors of modules that the config does not adapt.

    Returns () for a pattern that could take hours to match. Without target_modules PEFT adapts modules of its own
    choice, by the model's type. Parameters (target_parameters) and trained tokens beside other factors are not checked:
    other settings select them.
    """
    if config.get("peft_type") == "TRAINABLE_TOKENS":  # without target_modules: the model's input embeddings
        stated = config.get("target_modules") is not None
        left_out = [name for name in sorted(tensors.groups) if stated and not adapts(config, name)]
        return (_make_problem(tensors, left_out),) if left_out else ()
    left_out = [
        name
        for name, group in sorted(tensors.groups.items())
        if set(group) != {"T"} and not _of_parameters(name, config) and not adapts(config, name)
    ]
    outside = [name for name in tensors.groups if IN_A_LAYER.search(name) is None]
    if config.get("ensure_weight_tying") and any(adapts(config, name) for name in outside):
        left_out = [name for name in left_out if name not in outside]  # the weight that is tied to an adapted one
    problems = [_make_problem(tensors, left_out)] if left_out else []
    return (*problems, *_check_biases(config, tensors))


def _check_biases(config: Mapping[str, Any], tensors: PeftTensors) -> list[Problem]:
    """Return the problem of biases under names that PEFT does not load: those of its layers are base_layer.bias."""
    targets = config.get("target_modules")
    is_certain = not (isinstance(targets, str) and pattern_fault(targets) is not None)
    unloaded = []
    for name, inside in sorted(tensors.biases.items()):
        is_layer = name in tensors.groups or adapts(config, name)
        if is_layer != inside and (inside or is_certain or name in tensors.groups):
            unloaded.append(name)
    if not unloaded:
        return []
    return [
        Problem(
            f"{tensors.weights}: holds biases of {len(unloaded)} modules, first {unloaded[0]}, under names that PEFT "
            "does not load with this config",
            expected="base_layer.bias for modules that target_modules selects, bias for others",
            hint="use the adapter_config.json of the training; --force applies every tensor of the file",
        )
    ]


def _make_problem(tensors: PeftTensors, left_out: list[str]) -> Problem:
    return Problem(
        f"{tensors.weights}: holds factors of {len(left_out)} modules that its config does not adapt, first "
        f"{left_out[0]}: PEFT does not load them",
        expected="modules that target_modules, exclude_modules, layers_to_transform and modules_to_save select",
        hint="use the adapter_config.json of the training; --force applies every tensor of the file",
    )


def adapts(config: Mapping[str, Any], name: str) -> bool:
    """Return False where PEFT would not adapt the module at path `name` by this config."""
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save")
    if isinstance(excluded, str):
        if pattern_fault(excluded) is None and re.fullmatch(excluded, name):
            return False
    elif isinstance(excluded, list) and _ends_with(name, excluded):
        return False
    if isinstance(saved, list) and any(isinstance(module, str) and f".{module}." in f".{name}." for module in saved):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return not _ends_with(name, NOT_LINEAR)
        return pattern_fault(targets) is not None or bool(re.fullmatch(targets, name))
    if not isinstance(targets, list):
        return False
    return name in targets or (_ends_with(name, targets) and _in_layers(name, config))


def _ends_with(name: str, endings: list[Any]) -> bool:
    return any(isinstance(ending, str) and f".{name}".endswith(f".{ending}") for ending in endings)


def _in_layers(name: str, config: Mapping[str, Any]) -> bool:
    """Return False for a module of a layer that layers_to_transform leaves out."""
    chosen, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if chosen is None or chosen == []:
        return True
    named = [patterns] if isinstance(patterns, str) else patterns
    if named and isinstance(named, list):
        if any(not isinstance(pattern, str) or pattern_fault(pattern) is not None for pattern in named):
            return True
        match = next(
            filter(None, (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in named)), None
        )
    else:
        match = re.match(FIRST_INDEX, name)
    layers = chosen if isinstance(chosen, list) else [chosen]
    return match is not None and int(match["index"]) in layers


def _of_parameters(name: str, config: Mapping[str, Any]) -> bool:
    """Return True for a module whose factors may be those of one of its parameters."""
    entries = config.get("target_parameters") or []
    owner = name.partition(".base_layer")[0]
    if not isinstance(entries, list):
        return True  # reported by the reader
    owners = [entry.rpartition(".")[0].rpartition(".")[2] for entry in entries if isinstance(entry, str)]
    return "" in owners or owner.rpartition(".")[2] in owners
