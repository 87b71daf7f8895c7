"""Adapted experts in the layout that vLLM reads for every class of mixtures: one module per expert and projection.

    base_model.model.<owner>.experts.N.<projection>.lora_A.weight (R, in), .lora_B.weight (out, R)

N and the projection's name are those of the checkpoint, by which vLLM loads the base as well. FusedMoEWithLoRA takes
all experts and projections of a layer with one rank, or none: what is missing is written as zeros. Classes that adapt
stacked experts by default (is_3d_moe_weight) use it under --enable-mixed-moe-lora-format, which others ignore.
Source: vllm/lora/lora_weights.py (pack_moe), model_manager.py and utils.py, 0.28 and 0.32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adapter_merge.errors import Problem

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<projection>\w+)")  # a module of one expert
TARGET = "experts"  # what --lora-target-modules calls the experts of all layers
MIXED_FORMAT = "--enable-mixed-moe-lora-format"
HINT = "merge it into the base instead: adapter-merge merge"


def adapts_experts(modules: Any) -> bool:
    """Return True for modules of an adapter among which are experts, stacked or one module each."""
    from adapter_merge.methods.lora import StackModule

    return any(isinstance(module, StackModule) or EXPERT.fullmatch(module.name) for module in modules)


def target_of(name: str) -> str:
    """Return what --lora-target-modules calls the module `name`: its last component, or "experts"."""
    return TARGET if EXPERT.fullmatch(name) else name.rsplit(".", 1)[-1]


def find_expert_problems(source: Path, bound: Any) -> list[Problem]:
    """Return why vLLM cannot serve an adapter with experts; an empty list where it can."""
    from adapter_merge.methods.lora import ExpertModule, StackModule

    problems = []
    scaled = [item for item in bound.modules if item.module.magnitude is not None or item.module.own_magnitude]
    if scaled:
        cause = f"{source}: has row scales (DoRA, DuDe: {scaled[0].module.name}) and adapts experts"
        problems.append(Problem(f"{cause}, which vLLM adapts by plain LoRA alone", hint=HINT))
    stacked = {stack.a.name for stack in bound.adapter.modules if isinstance(stack, StackModule)}
    for item in bound.modules:
        of_expert = isinstance(item.module, ExpertModule) or EXPERT.fullmatch(item.module.name)
        name = item.name.removesuffix(".weight")
        if of_expert and EXPERT.fullmatch(name) is None:
            cause = f"{source}: adapts experts, and the base stores them stacked ({item.name})"
            problems.append(Problem(f"{cause}, so that their names in vLLM are not known", hint=HINT))
            break
        if not of_expert and getattr(item.module, "a", None) is not None and item.module.a.name in stacked:
            cause = f"{source}: adapts {item.name} as a bare parameter"
            problems.append(Problem(f"{cause}: a router is computed outside of vLLM's LoRA layers", hint=HINT))
            break
    return problems


def write_single_experts(folder: Path, checkpoint: Any) -> None:
    """Write the factor folder `folder` of an adapter with experts anew in this layout; other modules stay as they are.

    The rank of all experts is the largest among them. Raises AdapterMergeError where the folder does not fit the base.
    """
    import torch

    from adapter_merge.combine.origin import bind_checked
    from adapter_merge.factoring.factor_folder import FolderConfig, WeightFactors, write_folder
    from adapter_merge.formats.detection import open_adapter

    opened = open_adapter(folder, None, checkpoint)
    bound = bind_checked(opened, checkpoint)
    factors: dict[str, WeightFactors] = {}
    for item in bound.modules:
        form = item.form()
        stored = item.name.removesuffix(".weight")
        name = stored if EXPERT.fullmatch(stored) else item.module.name
        factors[name] = WeightFactors(name, form.up, form.down)
    experts = [name for name in factors if EXPERT.fullmatch(name)]
    rank = max(factors[name].rank for name in experts)
    owners = {match["experts"] for name in experts if (match := EXPERT.fullmatch(name))}
    for name, ref in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        match = EXPERT.fullmatch(module)
        if match is None or match["experts"] not in owners or len(ref.shape) != 2:
            continue
        out, inner = ref.shape
        given = factors.get(module, WeightFactors(module, torch.zeros(out, 0), torch.zeros(0, inner)))
        missing = rank - given.rank
        pad = torch.nn.functional.pad
        factors[module] = WeightFactors(module, pad(given.up, (0, missing)), pad(given.down, (0, 0, 0, missing)))
    targets = sorted({target_of(name) for name in factors})
    task = opened.config.get("task_type")
    settings = FolderConfig(opened.base_name, task if isinstance(task, str) else None, targets=targets)
    for file in folder.iterdir():
        file.unlink()
    write_folder(folder, list(factors.values()), {}, settings)
