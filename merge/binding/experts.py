"""Experts of a stacked parameter: in one 3-D tensor of the base, or in one 2-D tensor each.

Which way round PEFT's factors lie on (experts, n, m) changed twice (ParamWrapper.update_layer, get_delta_weight):

    before 0.19    A (experts r, n), B (m, r experts)     the delta is turned
    0.19.0         so, but for modules that say is_transposed: A (experts r, m), B (n, r experts)
    from 0.19.1    A (experts r, m), B (n, r experts), but for modules that say is_transposed: turned

The factors' own shapes tell them apart wherever n and m differ; on square experts the version does, which PEFT writes
into the config since 0.18. Llama 4 keeps (experts, in, out) and does not say is_transposed.
"""

from __future__ import annotations

import re

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.lora import ExpertModule, LoraModule, StackModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef

from .bound import BoundModule
from .embeddings import text_config
from .weight_names import DOWNS, GATES, UPS, Renaming

TRANSPOSED_EXPERTS = ("gpt_oss", "aria_text", "openai_privacy_filter")  # say is_transposed in transformers 5
INPUT_FIRST = (*TRANSPOSED_EXPERTS, "llama4_text")  # stacked as (experts, in, out)
TURNED_BEFORE = (0, 19, 0)
STRAIGHT_FROM = (0, 19, 1)


def bind_stack(
    module: StackModule, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> list[BoundModule] | Problem:
    """The experts of a stacked parameter: in one 3-D tensor, or one 2-D tensor each."""
    rows, columns = module.b.shape[0], module.a.shape[1]
    for parameter, rank, scale in module.targets:
        experts = module.a.shape[0] // rank

        def expert(index: int, part: tuple[int, int], experts: int = experts, scale: float = scale) -> ExpertModule:
            return ExpertModule(module.name, module.a, module.b, experts, index, scale, part)

        ref = base.tensors.get(rename(f"{module.name}.{parameter}"))
        if ref is not None and ref.dtype in FLOAT_DTYPES:
            if ref.shape == (rows, columns) and experts == 1:
                plain = LoraModule(module.name, module.a, module.b, scale, parameter=parameter)
                return [BoundModule(plain, ref)]
            if ref.shape in ((experts, rows, columns), (experts, columns, rows)):
                turned = _is_turned(adapter, base) if rows == columns else ref.shape[1] == columns
                if turned is None:
                    return Problem(
                        f"{module.name}.{parameter}: square experts, and no word which way round their factors lie",
                        "peft_version in adapter_config.json",
                        repr(adapter.config.get("peft_version"))[:100],
                        "add the version of PEFT that saved the adapter: 0.19.1 turned them round",
                    )
                step = ref.shape[1]
                return [
                    BoundModule(expert(index, (0, rows)), ref, turned, rows=(index * step, (index + 1) * step))
                    for index in range(experts)
                ]
        apart = _experts_apart(module.name, parameter, experts, (rows, columns), rename)
        if apart:
            return [BoundModule(expert(index, part), ref) for index, part, ref in apart]
    return Problem(
        f"{module.name}: none of the targeted parameters has the shape of the factors",
        f"a parameter ({', '.join(target[0] for target in module.targets)}) of (experts, {rows}, {columns})",
        f"A {module.a.shape}, B {module.b.shape}",
    )


def _is_turned(adapter: Adapter, base: Checkpoint) -> bool | None:
    """Whether the delta of square experts is turned round in the stored tensor; None where that cannot be known."""
    said = text_config(base.config).get("model_type")
    transposed = said in TRANSPOSED_EXPERTS
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(adapter.config.get("peft_version")))
    if version is None:
        return True if transposed else None  # turned by every version but 0.19.0
    number = tuple(int(part) for part in version.groups())
    if number < TURNED_BEFORE:
        return True
    return transposed if number >= STRAIGHT_FROM else not transposed


def _experts_apart(
    name: str, parameter: str, experts: int, shape: tuple[int, int], rename: Renaming
) -> list[tuple[int, tuple[int, int], TensorRef]]:
    """(expert, rows, tensor) for every 2-D weight that together make the stacked `parameter`; [] if one is missing."""
    rows, columns = shape
    kinds = {"gate_up_proj": (GATES, UPS), "down_proj": (DOWNS,)}.get(parameter)
    if kinds is None or rows % len(kinds):
        return []
    part = rows // len(kinds)
    found = []
    for index in range(experts):
        for place, kind in enumerate(kinds):
            names = [form for one in kind for form in rename.forms(f"{name}.{index}.{one}.weight")]
            ref = next((rename.held[form] for form in names if form in rename.held), None)
            if ref is None or ref.shape != (part, columns) or ref.dtype not in FLOAT_DTYPES:
                return []
            found.append((index, (place * part, (place + 1) * part), ref))
    return found
