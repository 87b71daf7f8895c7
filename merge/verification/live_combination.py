"""Combinations from live models: each adapter unmerged in its own model, their deltas combined by definition.

What an adapter does to a weight is read off the live layer (its answers to the unit vectors), so that neither the
canonical form nor the engine has a part in it. Experts of fused weights have no such layer: the algebra stands in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.combined_weight import CombinedModule
from adapter_merge.errors import UnsupportedError
from adapter_merge.methods.block_edits import applied
from adapter_merge.methods.lora import BiasModule
from adapter_merge.storage.tensor_io import read_tensor

from .combination_definition import defined_delta
from .live_adapter import adapted_model, is_embedding, live_layer, load_model, model_config
from .streamed_adapter import held_model, streamed_trained


def combined_model(bound: CombinedBound, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the base with the combination in its weights, computing in `dtype`."""
    return _with_weights(bound, live_weights(bound)).to(dtype).eval()


def live_weights(bound: CombinedBound) -> dict[str, Tensor]:
    """Return W' of every combined tensor, float64, in the stored orientation, from live adapters."""
    return _in_turn(bound) if bound.recipe.in_turn else _side_by_side(bound)


def _side_by_side(bound: CombinedBound) -> dict[str, Tensor]:
    """Return W' of every combined tensor, float64, as stored: the combination of the deltas on the base."""
    effects: dict[str, dict[str, Tensor]] = {}
    for item, part in zip(bound.recipe.ingredients, bound.parts, strict=True):
        if item.weight != 0:
            for name, after in _live_tensors(bound, item.name, part, _alone(part)).items():
                effects.setdefault(name, {})[item.name] = after
    weights = {}
    for module in _modules(bound):
        base = read_tensor(module.weight).to(torch.float64)
        whole = module.combination
        alone = effects.pop(module.name)
        own = [alone[share.adapter].reshape(base.shape) - base for share in whole.shares]
        parts = whole.parts([share.edit(torch.float64) for share in whole.shares])
        weights[module.name] = base + defined_delta(own, parts, whole.settings)[0]
    return weights


def _in_turn(bound: CombinedBound) -> dict[str, Tensor]:
    """Return W' of every tensor, float64: each adapter live on the result of those before it."""
    weights: dict[str, Tensor] = {}
    for item, part in zip(bound.recipe.ingredients, bound.parts, strict=True):
        live = adapted_model(part, torch.float64, _with_weights(bound, weights)) if weights else _alone(part)
        weights |= _live_tensors(bound, item.name, part, live, weights)
    return weights


def _alone(part: BoundAdapter) -> nn.Module:
    return held_model(streamed_trained(part, torch.float64))


def _modules(bound: CombinedBound) -> list[CombinedModule]:
    return [item for item in bound.modules if isinstance(item, CombinedModule)]


@torch.no_grad()
def _live_tensors(
    bound: CombinedBound, adapter: str, part: BoundAdapter, live: nn.Module, before: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return W' of this adapter alone, float64, as stored, for every tensor that it changes."""
    weights: dict[str, Tensor] = {}
    for module in _modules(bound):
        for share in module.combination.shares:
            if share.adapter != adapter:
                continue
            if share.replacement is not None:
                weights[module.name] = read_tensor(share.replacement).to(torch.float64)
                continue
            after = _read_off(live, share.modules[0]) if len(share.modules) == 1 else None
            if after is None:
                held = (before or {}).get(module.name)
                base = read_tensor(module.weight).to(torch.float64) if held is None else held
                rows = base.reshape(1, -1) if base.dim() < 2 else base
                after = applied(share.edit(torch.float64), rows).reshape(base.shape)
            weights[module.name] = after
    return weights


def _read_off(live: nn.Module, item: BoundModule) -> Tensor | None:
    """Return the weight that a live layer computes with, as stored; None where its output does not give it."""
    if item.rows is not None:
        return None
    try:
        layer: Any = live_layer(live, item.module.name)
    except (UnsupportedError, AttributeError):
        return None
    if len(item.weight.shape) != 2 and not isinstance(item.module, BiasModule):
        return None
    if is_embedding(layer):
        got: Tensor = layer(torch.arange(item.weight.shape[0]))
        return got if got.shape == item.weight.shape else None
    inner = _inner_size(layer)
    if inner is None:
        return None
    nothing: Tensor = layer(torch.zeros(1, inner, dtype=torch.float64))
    if isinstance(item.module, BiasModule):
        return nothing[0]
    answers: Tensor = layer(torch.eye(inner, dtype=torch.float64)) - nothing  # (in, out)
    after = answers if item.transposed else answers.T.contiguous()
    return after if after.shape == item.weight.shape else None


def _inner_size(layer: Any) -> int | None:
    """Return the input size of a linear layer."""
    get_base_layer = getattr(layer, "get_base_layer", None)
    inner = get_base_layer() if callable(get_base_layer) else layer
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return int(weight.shape[0] if type(inner).__name__ == "Conv1D" else weight.shape[1])


def _with_weights(bound: CombinedBound, weights: dict[str, Tensor]) -> nn.Module:
    """Return the base in float64 with `weights`, new trained heads, and embeddings tied as after the merge."""
    config = model_config(bound.base.folder)
    for key, value in bound.config_changes.items():
        setattr(config, key, value)
    model = load_model(bound.base, config).to(torch.float64)
    own = {name: read_tensor(ref) for name, ref in {**bound.copies, **bound.replacements}.items()}
    state = model.state_dict()
    for name, value in {**own, **weights}.items():
        target = next((candidate for candidate in _names(name, state) if candidate in state), None)
        if target is None or state[target].shape != value.shape:
            raise UnsupportedError(f"{name}: the model class {type(model).__name__} has no such tensor")
        state[target].copy_(value)
    return model


def _names(name: str, state: dict[str, Tensor]) -> list[str]:
    """Return the name, and its forms with one leading component more or less."""
    return [name, name.partition(".")[2], *(key for key in state if key.partition(".")[2] == name)]
