"""A known input through one scaled layer of the running model, after each load of an adapter with row scales.

vLLM promises nothing about how a token finds its slot. A version in which a layer no longer reads the slots, or reads
others, would serve DoRA and DuDe adapters without their scales and say nothing. So whenever an adapter has reached its
slot, two tokens with the same input pass through one of its layers, one for the adapter and one for the base, with
vLLM's own metadata. With u the output that the stock layer computes, y that of the scaled layer and d the adapter's
scales, the part of the change that arrived is

    c = <y - u, e> / |e|^2          e = (d - 1) * (u - bias) of the adapter's token; c is 1 where the scale works

and the base's row must not change. The layer is the one whose scales differ most from one. The layer runs eagerly:
whole graphs that vLLM compiled are told apart by their key (compile_key.py), not here.

A model that fails serves no adapter with row scales right, so the server ends: `fail` leaves the engine's process, and
vLLM's API server goes with its engine. In a process that vLLM did not start (LLM without a process of its own, Ray's
actors) it is an error of the load, and the adapter is not served.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

# c of a working layer is 1 within the rounding of y and u; of a layer without its scales it is 0.
TOLERANCE = 0.25

# A child of vLLM's own logger, so that the messages appear in its log.
logger = logging.getLogger("vllm.adapter_merge")


def check_slot(
    manager: Any,  # vLLM's LoRAModelManager, the adapter in its slot
    lora_id: int,
    scales: Mapping[str, Sequence[Tensor | None]],  # by layer, one (out_i,) per packed weight
) -> None:
    """Return when the adapter's most scaled layer scales the adapter's rows and not the base's; `fail` otherwise."""
    from vllm.lora.layers.utils import LoRAMapping

    slot = manager.lora_index_to_id.index(lora_id)
    mapping = LoRAMapping((lora_id, 0), (lora_id, 0), is_prefill=True)
    manager.set_adapter_mapping(mapping)  # the next batch sets its own
    # vLLM keeps tokens of the language model and of encoders apart; the mapping above is the language model's.
    names = [
        name for name in scales if manager.modules[name].punica_wrapper._token_lora_indices[:2].tolist() == [slot, -1]
    ]
    if not names:
        fail(f"vLLM put no token into slot {slot}, which was just filled; none of its layers can be checked.")
    name = max(names, key=lambda name: _strength(scales[name]))
    problem = probe(manager.modules[name], slot, scales[name])
    if problem:
        fail(
            f"{name} of the running model does not apply the row scales of the adapter that was just loaded: "
            f"{problem}. Expected all of it, and nothing for the base model. The adapter is not served. "
            "hint: this vLLM or another plugin has changed how LoRA layers work; serve the merged model."
        )


def fail(message: str) -> NoReturn:
    """End the engine's process with `message`; RuntimeError in a process that belongs to somebody else."""
    if multiprocessing.parent_process() is None:
        raise RuntimeError(message)
    logger.critical("%s", message)
    raise SystemExit(f"adapter-merge: {message}")  # vLLM answers an Exception and goes on


def probe(layer: Any, slot: int, scales: Sequence[Tensor | None]) -> str:
    """What is wrong with one layer whose metadata say: first token `slot`, second token base; "" for nothing."""
    from .row_scale import local_scale

    base = layer.base_layer
    bias = getattr(base, "bias", None)
    width = layer.lora_a_stacked[0].shape[-1]
    row = torch.cos(torch.arange(width, dtype=torch.float32, device=layer.device)).to(base.params_dtype)
    with torch.inference_mode():
        plain = layer.unscaled_apply(torch.stack([row, row]), bias).float()
        scaled = layer.apply(torch.stack([row, row]), bias).float()
        wanted = torch.zeros_like(plain[0])
        for start, values in local_scale(layer, scales):
            wanted[start : start + values.shape[0]] = values.to(wanted.device) - 1
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
