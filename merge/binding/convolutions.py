"""Adapted convolutions: the model's layers, where more than the weight's shape decides.

A weight (out, in / groups, k, ...) does not tell its groups, dilation or padding. They are read from the model's class
in transformers or diffusers, built without weights.

PEFT's LoRA runs A as an undilated convolution that pads with zeros, its LoHa and LoKr pad with zeros as well
(peft/tuners/lora/layer.py, _ConvNd.update_layer; loha and lokr, _get_delta_activations). Where the model's layer
computes otherwise, PEFT trained an update that no weight of the layer gives; PEFT's own merge adds the factors all the
same, and gives another model than the trained one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

from .bound import BoundModule
from .transformers_names import list_transformers_names

if TYPE_CHECKING:
    from collections.abc import Sequence

CONVOLVED = (LoraModule, LokrModule, LohaModule)  # methods that adapt a convolution, as the matrix (out, in k ...)
TRAINED_BY_PEFT = (AdapterFormat.PEFT, AdapterFormat.NATIVE, AdapterFormat.DIFFUSERS)


def kernel_of(item: BoundModule, base: Checkpoint) -> tuple[int, ...]:
    """Return the kernel of the convolution that is adapted; () for any other layer."""
    return stored_weight(item, base).shape[2:] if stored_weight(item, base) != item.weight else ()


def stored_weight(item: BoundModule, base: Checkpoint) -> TensorRef:
    """Return the adapted weight in its stored shape: of a convolution (out, in, k, ...), not as a matrix."""
    ref = base.tensors.get(item.weight.name)
    return item.weight if ref is None or ref.as_matrix() != item.weight else ref


def convolution_layers(
    items: Sequence[BoundModule], base: Checkpoint, config: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return the model's layer of each adapted convolution, by module name, and the reason where some are missing."""
    layers: dict[str, Any] = {}
    missing = [item for item in items if kernel_of(item, base)]
    reasons: list[str] = []
    for model, reason in _models(base, config) if missing else ():
        reasons += [reason] if reason else []
        held = dict(model.named_modules()) if model is not None else {}
        for item in missing:
            layer = held.get(item.module.name) or held.get(item.weight.name.removesuffix(".weight"))
            if layer is not None and _stores(layer, base, item):
                layers.setdefault(item.module.name, layer)
        missing = [item for item in missing if item.module.name not in layers]
        if not missing:
            break
    return layers, ("; ".join(reasons) or f"no layer {missing[0].module.name} in its class") if missing else ""


def unlike_weights(adapter: Adapter, items: Sequence[BoundModule], layers: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each convolution whose trained update is none of the layer's weight."""
    if adapter.format not in TRAINED_BY_PEFT:
        return []
    problems = []
    for item in items:
        layer: Any = layers.get(item.module.name)
        reason = None if layer is None else _difference(layer, isinstance(item.module, LoraModule))
        if reason is not None:
            problems.append(
                Problem(
                    f"{item.module.name}: {reason}",
                    "a convolution whose weight holds all that was trained",
                    f"{type(layer).__name__}({layer.extra_repr()})"[:200],
                    "PEFT's merge gives another model than the trained one here: run the adapter unmerged",
                )
            )
    return problems


def _difference(layer: Any, is_lora: bool) -> str | None:
    """Return how the layer computes otherwise than PEFT's update of it; None where both agree."""
    from torch import nn

    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own = type(layer)
    if not any(own.forward is kind.forward and own._conv_forward is kind._conv_forward for kind in plain):
        return "its class has a forward of its own, beside which PEFT's update of a convolution runs"
    wide = math.prod(layer.kernel_size) > 1
    if is_lora and wide and set(layer.dilation) != {1}:
        return "the layer is dilated, and PEFT's LoRA of it is not"
    padded = layer.padding == "same" if isinstance(layer.padding, str) else any(layer.padding)
    if layer.padding_mode != "zeros" and padded:
        return f"the layer pads in the mode {layer.padding_mode}, and PEFT's update of it with zeros"
    return None


def _stores(layer: Any, base: Checkpoint, item: BoundModule) -> bool:
    """Return True for a convolution of the stored weight's shape."""
    weight = getattr(layer, "weight", None)
    ref = base.tensors[item.weight.name]
    return weight is not None and tuple(weight.shape) == ref.shape and hasattr(layer, "groups")


def _models(base: Checkpoint, config: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield models of the base's classes without weights, and the reason where one cannot be built."""
    kind = base.config.get("_class_name")
    if not isinstance(kind, str):
        names, reason = list_transformers_names(base, config)
        yield from ((item.model, "") for item in names)
        yield None, reason
        return
    try:
        import diffusers
        import torch

        made = getattr(diffusers, kind)
        with torch.device("meta"):
            yield made.from_config({key: value for key, value in base.config.items() if key != "_name_or_path"}), ""
    except Exception as error:  # model code may raise anything for an unexpected config
        yield None, f"{kind} of diffusers: {type(error).__name__}: {error}"[:300]
