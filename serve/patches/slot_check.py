"""A known input through scaled layers of the running model, at its start and after each load of an adapter with scales.

vLLM promises nothing about how a token finds its slot. A version in which a layer no longer reads the slots, or reads
others, would serve DoRA and DuDe adapters without their scales and say nothing. So whenever an adapter has reached its
slot, two tokens with the same input pass through one of its layers, one for the adapter and one for the base, with
vLLM's own metadata. With u the output that the stock layer computes, y that of the scaled layer and d the adapter's
scales, the part of the change that arrived is

    c = <y - u, e> / |e|^2          e = (d - 1) * (u - bias) of the adapter's token; c is 1 where the scale works

and the base's row must not change. The layers are the first, the middle and the last one, and of each class of layers
the one whose scales differ most from one. The same is done once when the model has its LoRA layers, with scales made
up for it in a slot that is empty: a model that cannot serve row scales ends before its first adapter. The layers run
eagerly: whole graphs that vLLM compiled are told apart by their key (compile_key.py), not here.

A model that fails serves no adapter with row scales right, so the server ends: `fail` leaves the engine's process, and
vLLM's API server goes with its engine. In a process that vLLM did not start (LLM without a process of its own, Ray's
actors) it is an error of the load, and the adapter is not served.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

# c of a working layer is 1 within the rounding of y and u; of a layer without its scales it is 0.
TOLERANCE = 0.25
HINT = "hint: this vLLM or another plugin has changed how LoRA layers work; serve the merged model."

# A child of vLLM's own logger, so that the messages appear in its log.
logger = logging.getLogger("vllm.adapter_merge")


def check_slot(
    manager: Any,  # vLLM's LoRAModelManager, the adapter in its slot
    lora_id: int,
    scales: Mapping[str, Sequence[Tensor | None]],  # by layer, one (out_i,) per packed weight
) -> None:
    """Return when the adapter's layers scale the adapter's rows and not the base's; `fail` otherwise."""
    names = layers_with_tokens(manager, lora_id, scales)
    strengths = {name: _strength(scales[name]) for name in names}
    for name in chosen(manager, strengths):
        layer = manager.modules[name]
        problem = probe(layer, change_of(layer, scales[name]))
        if problem:
            fail(
                f"{name} of the running model does not apply the row scales of the adapter that was just loaded: "
                f"{problem}. Expected all of it, and nothing for the base model. The adapter is not served. {HINT}"
            )


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """`original` is LoRAModelManager.__init__, which replaces the model's layers: they are tested then."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        check_model(self)

    return __init__


def check_model(manager: Any) -> None:
    """Return when layers of a model without adapters apply scales in its first slot; `fail` otherwise."""
    scaled = [name for name, layer in manager.modules.items() if hasattr(layer, "set_row_scale")]
    if not scaled:
        return
    manager.lora_index_to_id[0] = lora_id = 1
    try:
        names = layers_with_tokens(manager, lora_id, scaled)
        for name in chosen(manager, dict.fromkeys(names, 1.0)):
            row = manager.modules[name].row_scale[0]
            change = 0.5 * torch.cos(torch.arange(row.shape[0], dtype=torch.float32, device=row.device))
            row.copy_(change + 1)
            problem = probe(manager.modules[name], change)
            row.fill_(1)
            if problem:
                fail(
                    f"{name} of this model does not apply row scales: {problem}. Expected all of it, and nothing for "
                    f"the base model. DoRA and DuDe adapters cannot be served. {HINT}"
                )
    finally:
        manager.lora_index_to_id[0] = None
        manager._last_mapping = None  # the next batch sets its own


def layers_with_tokens(manager: Any, lora_id: int, names: Iterable[str]) -> list[str]:
    """Those of `names` whose metadata now say: first token of the adapter's slot, second token of the base."""
    from vllm.lora.layers.utils import LoRAMapping

    slot = manager.lora_index_to_id.index(lora_id)
    mapping = LoRAMapping((lora_id, 0), (lora_id, 0), is_prefill=True)
    manager.set_adapter_mapping(mapping)  # the next batch sets its own
    # vLLM keeps tokens of the language model and of encoders apart; the mapping above is the language model's.
    found = [
        name for name in names if manager.modules[name].punica_wrapper._token_lora_indices[:2].tolist() == [slot, -1]
    ]
    if not found:
        fail(f"vLLM put no token into slot {slot}, which was just filled; none of its layers can be checked.")
    return found


def chosen(manager: Any, strengths: Mapping[str, float]) -> list[str]:
    """The first, middle and last layer that is scaled, and the most scaled one of each class of layers."""
    names = [name for name, strength in strengths.items() if strength > 0]
    if not names:
        return []
    most: dict[type, str] = {}
    for name in sorted(names, key=strengths.__getitem__):
        most[type(manager.modules[name])] = name
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1], *most.values()]))


def fail(message: str) -> NoReturn:
    """End the engine's process with `message`; RuntimeError in a process that belongs to somebody else."""
    if multiprocessing.parent_process() is None:
        raise RuntimeError(message)
    logger.critical("%s", message)
    raise SystemExit(f"adapter-merge: {message}")  # vLLM answers an Exception and goes on


def change_of(layer: Any, scales: Sequence[Tensor | None]) -> Tensor:
    """d - 1 of every row of the layer on this rank, (out,) float32."""
    from .row_scale import local_scale

    change = torch.zeros(layer.row_scale.shape[1], device=layer.row_scale.device)
    for start, values in local_scale(layer, scales):
        change[start : start + values.shape[0]] = values.to(change.device) - 1
    return change


def probe(
    layer: Any,  # whose metadata say: first token of a slot, second token of the base
    wanted: Tensor,  # (out,) d - 1 of that slot
) -> str:
    """What is wrong with one layer; "" for nothing."""
    base = layer.base_layer
    bias = getattr(base, "bias", None)
    width = layer.lora_a_stacked[0].shape[-1]
    row = torch.cos(torch.arange(width, dtype=torch.float32, device=layer.device)).to(base.params_dtype)
    with torch.inference_mode():
        plain = layer.unscaled_apply(torch.stack([row, row]), bias).float()
        scaled = layer.apply(torch.stack([row, row]), bias).float()
        offset = 0 if bias is None else bias.float()
        eps = torch.finfo(base.params_dtype).eps
        change = wanted * (plain - offset)  # (2, out): e of the adapter's row, and what e would be for the base's
        size = change.square().sum(dim=1)
        if float(size[0].sqrt()) <= 8 * eps * float(plain[0].norm()) / plain.shape[1] ** 0.5:
            return ""  # within the rounding of u and y such scales change nothing
        arrived = ((scaled - plain) * change).sum(dim=1) / size
        most = float((scaled[1] - plain[1]).abs().max())
    if abs(float(arrived[0]) - 1) > TOLERANCE:
        return f"{float(arrived[0]):.3g} times the change arrived"
    if abs(float(arrived[1])) > TOLERANCE or most > 4 * eps * float(plain[1].abs().max()):
        return "the row of the base model changed"
    return ""


def _strength(scales: Sequence[Tensor | None]) -> float:
    """|d - 1| over all weights of one layer."""
    return float(sum(float((scale - 1).square().sum()) for scale in scales if scale is not None) ** 0.5)
