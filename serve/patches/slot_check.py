"""Test of row scales in the running model, at its start and after each load of an adapter with scales.

How vLLM maps tokens to slots is not a public API. A version in which a layer no longer reads these slots would serve
DoRA and DuDe adapters without their scales, silently. After an adapter has been loaded into its slot, two tokens with
the same input are therefore computed by some of its layers, one for the adapter and one for the base, with vLLM's own
metadata. With u the output of the stock layer, y that of the scaled layer and d the adapter's scales, the applied share
of the change is

    c = <y - u, e> / |e|^2          e = (d - 1) * (u - bias) of the adapter's token; c is 1 where the scale works

and the base's row must not change. Tested are the first, the middle and the last layer, and from each class of layers
the one whose scales differ most from one. The same test runs once when the model has got its LoRA layers, with
artificial scales in an empty slot, so that a model that cannot serve row scales fails before its first adapter. The
layers run eagerly; compiled graphs are distinguished by their key (compile_key.py).

A model that fails the test cannot serve any adapter with row scales correctly, so the server ends: `fail` exits the
engine's process, and vLLM's API server ends with its engine. In a process that vLLM did not start (LLM in the caller's
process, Ray's actors) the load raises an error, and the adapter is not served.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

# c is 1 for a working layer, within the rounding of y and u, and 0 for a layer that ignores its scales.
TOLERANCE = 0.25
HINT = "hint: this vLLM or another plugin has changed how LoRA layers work; serve the merged model."

# A child of vLLM's own logger, so that the messages appear in its log.
logger = logging.getLogger("vllm.adapter_merge")


def check_slot(
    manager: Any,  # vLLM's LoRAModelManager, the adapter in its slot
    lora_id: int,
    scales: Mapping[str, Sequence[Tensor | None]],  # by layer, one (out_i,) per packed weight
) -> None:
    """Return if the adapter's layers scale the adapter's rows and not the base's; else call `fail`."""
    names = layers_with_tokens(manager, lora_id, scales)
    strengths = {name: _measure_strength(scales[name]) for name in names}
    for name in choose_layers(manager, strengths):
        layer = manager.modules[name]
        problem = probe(layer, compute_change(layer, scales[name]))
        if problem:
            fail(
                f"{name} of the running model does not apply the row scales of the adapter that was just loaded: "
                f"{problem}. Expected: 1 times the change, and no change for the base model. "
                f"The adapter is not served. {HINT}"
            )


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap LoRAModelManager.__init__ (`original`), which replaces the model's layers: test them afterwards."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        check_model(self)

    return __init__


def check_model(manager: Any) -> None:
    """Return if layers of a model without adapters apply scales in its first slot; otherwise call `fail`."""
    scaled = [name for name, layer in manager.modules.items() if hasattr(layer, "set_row_scale")]
    if not scaled:
        return
    manager.lora_index_to_id[0] = lora_id = 1
    try:
        names = layers_with_tokens(manager, lora_id, scaled)
        for name in choose_layers(manager, dict.fromkeys(names, 1.0)):
            row = manager.modules[name].row_scale[0]
            change = 0.5 * torch.cos(torch.arange(row.shape[0], dtype=torch.float32, device=row.device))
            row.copy_(change + 1)
            problem = probe(manager.modules[name], change)
            row.fill_(1)
            if problem:
                fail(
                    f"{name} of this model does not apply row scales: {problem}. Expected: 1 times the change, and no "
                    f"change for the base model. DoRA and DuDe adapters cannot be served. {HINT}"
                )
    finally:
        manager.lora_index_to_id[0] = None
        manager._last_mapping = None  # the next batch sets its own


def layers_with_tokens(manager: Any, lora_id: int, names: Iterable[str]) -> list[str]:
    """Set metadata with a token of the adapter and one of the base; return the layers in `names` that received it."""
    from vllm.lora.layers.utils import LoRAMapping

    slot = manager.lora_index_to_id.index(lora_id)
    mapping = LoRAMapping((lora_id, 0), (lora_id, 0), is_prefill=True)
    manager.set_adapter_mapping(mapping)  # the next batch sets its own
    # vLLM has separate metadata for the language model and for encoders; the mapping above is the language model's.
    reached = [
        name for name in names if manager.modules[name].punica_wrapper._token_lora_indices[:2].tolist() == [slot, -1]
    ]
    if not reached:
        fail(f"vLLM assigned no token to slot {slot}, which was just filled; no layer can be checked.")
    return reached


def choose_layers(manager: Any, strengths: Mapping[str, float]) -> list[str]:
    """Return the first, middle and last scaled layer, and of each class of layers the one with the largest scales."""
    names = [name for name, strength in strengths.items() if strength > 0]
    if not names:
        return []
    most: dict[type, str] = {}
    for name in sorted(names, key=strengths.__getitem__):
        most[type(manager.modules[name])] = name
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1], *most.values()]))


def fail(message: str) -> NoReturn:
    """End the engine's process with `message`; raise RuntimeError in a process that vLLM did not start."""
    if multiprocessing.parent_process() is None:
        raise RuntimeError(message)
    logger.critical("%s", message)
    raise SystemExit(f"adapter-merge: {message}")  # vLLM would catch an Exception and continue


def compute_change(layer: Any, scales: Sequence[Tensor | None]) -> Tensor:
    """Return d - 1 of every row of the layer on this rank, (out,) float32."""
    from .row_scale import local_scale

    change = torch.zeros(layer.row_scale.shape[1], device=layer.row_scale.device)
    for start, values in local_scale(layer, scales):
        change[start : start + values.shape[0]] = values.to(change.device) - 1
    return change


def probe(
    layer: Any,  # its metadata assign the first token to a slot, the second to the base
    expected: Tensor,  # (out,) d - 1 of that slot
) -> str:
    """Run two tokens through a layer; return what is wrong with the result, "" for nothing."""
    base = layer.base_layer
    bias = getattr(base, "bias", None)
    width = layer.lora_a_stacked[0].shape[-1]
    row = torch.cos(torch.arange(width, dtype=torch.float32, device=layer.device)).to(base.params_dtype)
    with torch.inference_mode():
        plain = layer.unscaled_apply(torch.stack([row, row]), bias).float()
        scaled = layer.apply(torch.stack([row, row]), bias).float()
        offset = 0 if bias is None else bias.float()
        eps = torch.finfo(base.params_dtype).eps
        change = expected * (plain - offset)  # (2, out): e of the adapter's row, and the same for the base's row
        size = change.square().sum(dim=1)
        if float(size[0].sqrt()) <= 8 * eps * float(plain[0].norm()) / plain.shape[1] ** 0.5:
            return ""  # the change is smaller than the rounding of u and y
        applied = ((scaled - plain) * change).sum(dim=1) / size
        most = float((scaled[1] - plain[1]).abs().max())
    if abs(float(applied[0]) - 1) > TOLERANCE:
        return f"{float(applied[0]):.3g} times the change was applied"
    if abs(float(applied[1])) > TOLERANCE or most > 4 * eps * float(plain[1].abs().max()):
        return "the row of the base model changed"
    return ""


def _measure_strength(scales: Sequence[Tensor | None]) -> float:
    """Return the norm of d - 1 over all weights of one layer."""
    return float(sum(float((scale - 1).square().sum()) for scale in scales if scale is not None) ** 0.5)
