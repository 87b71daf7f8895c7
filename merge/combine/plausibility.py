"""Warnings of what is possible, but seldom meant: layers without an adapter, changes larger than the weights.

Nothing here is an error: an adapter may be trained on some layers only, or with a large alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from adapter_merge.binding.bound import BoundAdapter
from adapter_merge.errors import AdapterMergeError
from adapter_merge.methods.block_edits import apply_edit
from adapter_merge.storage.tensor_io import read_tensor

from .origin import sample_modules

LARGE = 10.0  # ||dW|| / ||W||; training a low-rank adapter moves a weight by less than its own norm
NAMED = 6  # names in a warning
# Settings with which PEFT adapts some of the modules that target_modules names.
CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def warn_of_missing_layers(bound: BoundAdapter) -> list[str]:
    """Return a warning where target_modules names weights of the base that the adapter's files leave out.

    Only for a list of names: PEFT adapts every module whose name ends with one of them.
    """
    config = bound.adapter.config
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in CHOOSING):
        return []
    adapted = {item.weight.name for item in bound.modules} | {item.name for item in bound.modules}
    adapted |= bound.replacements.keys()
    left_out = []
    for name, ref in bound.base.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(ref.shape) < 2 or name in adapted:
            continue
        if any(module == target or module.endswith(f".{target}") for target in targets if isinstance(target, str)):
            left_out.append(module)
    if not left_out or not bound.modules:
        return []
    return [
        f"{bound.adapter.folder}: {len(left_out)} of {len(left_out) + len(bound.modules)} weights that its "
        f"target_modules name have no adapter: {_list_names(left_out)}"
    ]


def warn_of_large_changes(changes: Mapping[str, float]) -> list[str]:
    """Return a warning where a change is far larger than its weight; changes: ||dW|| / ||W|| by weight."""
    large = sorted((name for name, change in changes.items() if not change <= LARGE), key=lambda name: -changes[name])
    if not large:
        return []
    return [
        f"the change is more than {LARGE:g} times as large as the weight itself in {len(large)} of {len(changes)} "
        f"weights (up to {changes[large[0]]:.3g} times): {_list_names(large)}; is alpha right, and is this the base?"
    ]


def sample_changes(bound: BoundAdapter) -> dict[str, float]:
    """Return ||dW|| / ||W|| of a few small weights sample_modules over the model, in float32."""
    found = {}
    for item in sample_modules(bound.modules):
        try:
            weight = item.oriented_weight().float()
            edit = item.module.edit(read_tensor, item.oriented_weight, torch.float32)
            change = apply_edit(edit, weight.clone()) - weight
        except AdapterMergeError:  # reported where the adapter is used
            continue
        size = float(torch.linalg.vector_norm(weight.double()))
        if size > 0:
            ratio = float(torch.linalg.vector_norm(change.double())) / size
            found[item.name] = math.inf if math.isnan(ratio) else ratio
    return found


def warn_of_nonfinite(names: Iterable[str]) -> list[str]:
    """Return a warning of base tensors with NaN or infinity, which are carried over as they are."""
    listed = sorted(names)
    if not listed:
        return []
    return [f"the base holds NaN or infinity in {len(listed)} weights, which are carried over: {_list_names(listed)}"]


def _list_names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
