"""Combinations by the papers' definitions, on whole tensors in float64; and what PEFT makes of each adapter alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from pico_bases import load, quiet, train
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import Ingredient, Recipe, make_recipe

SOME = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": SOME},
    "rslora": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": SOME},
    "dude": {"r": 4, "use_dora": True, "init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
}
WEIGHTS = {"lora": 0.7, "rslora": 0.5, "dora": 0.4, "dude": -0.3}


def train_all(base: Path, folder: Path, configs: Mapping[str, Mapping[str, Any]] = CONFIGS) -> dict[str, Path]:
    """An adapter folder of each config, every trained tensor moved from its start."""
    for seed, (name, arguments) in enumerate(configs.items()):
        train(base, peft.LoraConfig(**arguments), folder / name, seed=seed)
    return {name: folder / name for name in configs}


def recipe(adapters: Mapping[str, Path], weights: Mapping[str, float], **settings: Any) -> Recipe:
    ingredients = [
        Ingredient(name, str(adapters[name]), weight, None, None, stated_of(adapters[name], name))
        for name, weight in weights.items()
    ]
    return make_recipe(ingredients, Settings(**settings))


def stated_of(adapter: Path, name: str) -> dict[str, str]:
    """The dtype that the base was loaded in, and with it the residual of a DuDe: the one that it is stored in."""
    if name != "dude":
        return {}
    base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    return {"residual_dtype": json.loads((base / "config.json").read_text())["dtype"]}


def own_dtype(base: Path) -> torch.dtype:
    """What the base is stored in: PiSSA's residual is rounded to it."""
    return next(iter(load_file(base / "model.safetensors").values())).dtype


def effects(base: Path, adapters: Mapping[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Each adapter's effect on every weight: put into the base as it is stored, merged by PEFT in float64."""
    before = load(base, torch.float64).state_dict()
    found = {}
    for name, folder in adapters.items():
        with quiet():
            live = peft.PeftModel.from_pretrained(load(base, own_dtype(base)), folder)
            after = live.double().merge_and_unload().state_dict()
        for key, value in load_file(folder / "adapter_model.safetensors").items():  # PEFT rounds heads to a bf16 base
            if key.removeprefix("base_model.model.") in after:
                after[key.removeprefix("base_model.model.")] = value.double()
        found[name] = {k: after[k] - before[k] for k in before if not torch.equal(before[k], after[k])}
    return found


def one_after_the_other(base: Path, adapters: list[Path]) -> dict[str, Tensor]:
    """W' of every weight, float64: each adapter loaded by PEFT on what the one before it has left."""
    model: Any = load(base, own_dtype(base))
    for number, folder in enumerate(adapters):
        with quiet():
            live = peft.PeftModel.from_pretrained(model, folder)
            model = (live.double() if number == 0 else live).merge_and_unload().double()
    state: dict[str, Tensor] = model.state_dict()
    return state


def top(delta: Tensor, count: int) -> Tensor:
    """The `count` largest elements by size, the rest zero."""
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[delta.abs().flatten().float().argsort(descending=True, stable=True)[:count]] = True
    return delta * kept.view_as(delta)


def elect(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """TIES, steps 2 and 3, with the mean taken by weight and lambda = sum |w|."""
    stack = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = torch.sign(stack.sum(0))
    agree = (torch.sign(stack) == sign) & (stack != 0)
    sizes = torch.tensor([abs(w) for w in weights], dtype=stack.dtype)
    sizes = sizes.reshape(-1, *[1] * (stack.dim() - 1))
    share = (agree * sizes).sum(0)
    return torch.where(share > 0, (stack * agree).sum(0) / share.clamp_min(1e-30), 0.0) * sizes.sum()


def expected(
    method: str, parts: list[Tensor], weights: list[float], density: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """The combined delta of one tensor; DARE's random numbers are not here."""
    if method in ("magnitude-prune", "ties"):
        parts = [top(delta, int(density * delta.numel())) for delta in parts]
    elif method == "breadcrumbs":
        cut = [(delta, int(gamma * delta.numel()), int(density * delta.numel())) for delta in parts]
        parts = [top(delta, outliers + kept) - top(delta, outliers) for delta, outliers, kept in cut]
    if method == "ties" and len(parts) > 1:
        return elect(parts, weights)
    return torch.stack([w * p for w, p in zip(weights, parts, strict=True)]).sum(0)
