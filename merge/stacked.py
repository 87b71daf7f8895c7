"""Experts of a stacked parameter: in one 3-D tensor of the base, or in one 2-D tensor each."""

from __future__ import annotations

from .bound import BoundModule
from .checkpoint import Checkpoint
from .errors import Problem
from .headers import FLOAT_DTYPES, TensorRef
from .lora import ExpertModule, LoraModule, StackModule
from .names import DOWNS, GATES, UPS, Renaming

TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "dbrx")  # stacked as (experts, in, out)


def bind_stack(module: StackModule, base: Checkpoint, rename: Renaming) -> list[BoundModule] | Problem:
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
            turned = base.config.get("model_type") in TRANSPOSED_EXPERTS
            straight = ref.shape == (experts, rows, columns) and not (turned and rows == columns)
            if straight or (ref.shape == (experts, columns, rows) and turned):
                step = ref.shape[1]
                return [
                    BoundModule(expert(index, (0, rows)), ref, not straight, rows=(index * step, (index + 1) * step))
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
