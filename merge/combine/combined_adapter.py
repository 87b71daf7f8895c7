"""Combination of adapters that are bound to one base: one edit per tensor, from each adapter's own scales and norms.

A `CombinedBound` is a `BoundAdapter`, which merge, delta, factor and verify take like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.binding.embeddings import EMBEDDINGS
from adapter_merge.binding.positional import check_together
from adapter_merge.binding.trained_base import open_trained_base
from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.methods.lora import ExpertModule, RowSliceModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_comparison import same_but_for_rounding

from .combined_weight import CombinedModule, CombinedWeight, Share
from .delta_ops import Settings
from .origin import bind_checked
from .recipe import Ingredient, Recipe


@dataclass(frozen=True)
class CombinedBound(BoundAdapter):
    """The combination of adapters that are bound to one base; its modules are `CombinedModule`s."""

    parts: tuple[BoundAdapter, ...] = ()  # in the order of the recipe's ingredients
    recipe: Recipe = field(default_factory=lambda: Recipe((), Settings()))

    def factor_modules(self) -> tuple[CombinedModule, ...]:
        """Return the combined weights that low-rank factors can hold.

        Raises UnsupportedError for trained tokens, experts and parts of fused weights: a PEFT folder cannot hold
        their combination.
        """
        problems = [
            Problem(
                f"{item.name}: {share.adapter} changes it by more than low-rank factors",
                hint="merge the combination instead",
            )
            for item in self._combined_modules()
            for share in item.combination.shares
            if any(
                isinstance(bound.module, TokenModule | ExpertModule | RowSliceModule)
                or bound.rows is not None
                or bound.module.parameter not in ("weight", "bias")
                for bound in share.modules
            )
        ]
        raise_all(problems, UnsupportedError)
        return tuple(item for item in self._combined_modules() if item.combination.is_matrix)

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return combined heads and biases by tensor name, float32; a PEFT folder stores them beside its factors."""
        return {item.name: item.merged_weight() for item in self._combined_modules() if not item.combination.is_matrix}

    def _combined_modules(self) -> list[CombinedModule]:
        return [item for item in self.modules if isinstance(item, CombinedModule)]


def open_combination(recipe: Recipe, base: str | Path | None = None) -> CombinedBound:
    """Open every adapter of `recipe` and bind it to `base`, or to the recipe's base. Raises AdapterMergeError."""
    chosen = base if base is not None else recipe.base
    if chosen is None:
        raise InputError("a combination needs its base", expected="BASE NAME=ADAPTER ..., or base in the recipe")
    stated = {(item.options or {}).get("trained_on") for item in recipe.ingredients}
    if len(stated) > 1:
        raise InputError(
            "the adapters were trained on different bases",
            got=", ".join(sorted(str(text) for text in stated)),
            hint="their deltas apply to different weights: merge one at a time",
        )
    checkpoint = open_trained_base(chosen, stated.pop() if stated else None)
    bound: list[BoundAdapter] = []
    for item in recipe.ingredients:
        options = ReadOptions(**(item.options or {}))
        opened = bind_checked(open_adapter(item.path, options, checkpoint), checkpoint, item.base_kind)
        if opened.base_kind == "residual" and (bound or not recipe.in_turn):
            raise InputError(
                f"{item.name!r} was trained on a residual base, and other adapters are combined with it",
                hint="combine on the original base",
            )
        bound.append(opened)
    return _combine_bound(recipe, tuple(bound), checkpoint)


def _combine_bound(recipe: Recipe, parts: tuple[BoundAdapter, ...], base: Checkpoint) -> CombinedBound:
    """Combine bound adapters into one. Raises InputError with every conflict between them."""
    used = [(item, bound) for item, bound in zip(recipe.ingredients, parts, strict=True) if item.weight != 0]
    modules, problems = _group_by_tensor(recipe, used, base)
    problems += check_together([(item.name, bound) for item, bound in used], recipe.in_turn)
    replaced: dict[str, tuple[str, TensorRef]] = {}
    changes: dict[str, Any] = {}
    copies: dict[str, TensorRef] = {}
    names = {module.name for module in modules}
    for item, bound in used:
        for name, ref in bound.replacements.items():
            if _combinable(base, name, ref):
                continue
            if (name in replaced and not recipe.in_turn) or name in names:
                problems.append(
                    Problem(
                        f"{name}: {item.name!r} and another adapter replace it, and the base has none of its shape",
                        hint="without a base tensor there is no delta to combine: leave one adapter out",
                    )
                )
            replaced[name] = (item.name, ref)
        for key, value in bound.config_changes.items():
            if changes.setdefault(key, value) != value:
                problems.append(Problem(f"the adapters disagree about {key}", got=f"{changes[key]} and {value}"))
        copies |= bound.copies
    if changes.get("tie_word_embeddings") is False:
        problems += [
            Problem(f"{item.name!r} trained tokens of tied embeddings, and another adapter unties them")
            for item, bound in used
            if "tie_word_embeddings" not in bound.config_changes
            and any(isinstance(m.module, TokenModule) and m.name.endswith(EMBEDDINGS) for m in bound.modules)
        ]
    raise_all(problems, InputError)
    replacements = {name: ref for name, (_, ref) in replaced.items()}
    return CombinedBound(
        adapter=_describe_as_adapter(recipe, parts, modules, replacements),
        base=base,
        modules=modules,
        replacements=replacements,
        base_kind=parts[0].base_kind,
        copies=copies,
        config_changes=changes,
        parts=parts,
        recipe=recipe,
    )


def _combinable(base: Checkpoint, name: str, ref: TensorRef) -> bool:
    """Return True when the base holds a float tensor of this name and shape, so that the trained tensor has a delta."""
    old = base.tensors.get(name)
    return old is not None and old.shape == ref.shape and bool(ref.shape) and ref.dtype in FLOAT_DTYPES


def _group_by_tensor(
    recipe: Recipe, used: list[tuple[Ingredient, BoundAdapter]], base: Checkpoint
) -> tuple[tuple[CombinedModule, ...], list[Problem]]:
    """Return one combined module per changed tensor, and the problems."""
    shares: dict[str, list[Share]] = {}
    places: dict[str, BoundModule | TensorRef] = {}
    weights: dict[str, TensorRef] = {}
    problems: list[Problem] = []
    for item, bound in used:
        density = recipe.settings.density if item.density is None else item.density
        grouped: dict[str, list[BoundModule]] = {}
        for module in bound.modules:
            grouped.setdefault(module.name, []).append(module)
        for name, modules in grouped.items():
            ref = modules[0].weight
            if recipe.in_turn and name in shares and _is_result_of(shares[name][-1], ref):
                ref = weights[name]
                modules = [replace(module, weight=ref) for module in modules]
            if weights.setdefault(name, ref) != ref:
                problems.append(
                    Problem(
                        f"{name}: the adapters were trained on different versions of it",
                        hint="combine adapters of one vocabulary size",
                    )
                )
            if recipe.in_turn and name in shares and any(_starts_from_base(module) for module in modules):
                problems.append(
                    Problem(
                        f"{name}: {item.name!r} is initialised from the weight, which the adapter before it "
                        "has changed",
                        hint="merge the one before it, then this one into the result",
                    )
                )
            places.setdefault(name, modules[0])
            shares.setdefault(name, []).append(Share(item.name, item.weight, density, tuple(modules)))
        for name, ref in bound.replacements.items():
            if not _combinable(base, name, ref):
                continue  # replaced, not combined: see `_combine_bound`
            old = base.tensors[name]
            if weights.setdefault(name, old) != old or any(s.adapter == item.name for s in shares.get(name, ())):
                problems.append(Problem(f"{name} is adapted and replaced at once by {item.name!r}"))
            places.setdefault(name, old)
            shares.setdefault(name, []).append(Share(item.name, item.weight, density, (), ref))
    combined = []
    for name, tensor_shares in shares.items():
        place, ref = places[name], weights[name]
        turned = isinstance(place, BoundModule) and place.transposed
        shape = ref.shape if len(ref.shape) > 1 else (1, *ref.shape)
        shape = (shape[1], shape[0]) if turned else (shape[0], shape[-1])
        combination = CombinedWeight(name, shape, tuple(tensor_shares), recipe.settings, recipe.in_turn)
        combined.append(CombinedModule(combination, ref, turned, None if name == ref.name else name))
    return tuple(combined), problems


def _is_result_of(share: Share, ref: TensorRef) -> bool:
    """Return True where `ref`, saved beside a later adapter, is the weight that the earlier one put in place."""
    return share.replacement is not None and same_but_for_rounding(share.replacement, ref)


def _starts_from_base(bound: BoundModule) -> bool:
    """Return True for PiSSA, OLoRA and DuDe, whose frozen residual is computed from the weight."""
    return bound.module.needs_base or bound.module.initial is not None


def _describe_as_adapter(
    recipe: Recipe,
    parts: tuple[BoundAdapter, ...],
    modules: tuple[CombinedModule, ...],
    replacements: dict[str, TensorRef],
) -> Adapter:
    """Describe the combination as an `Adapter`; its names, task and heads are written to the output's config."""
    adapters = [bound.adapter for bound in parts]
    saved: set[str] = set()
    for adapter in adapters:
        stated = adapter.config.get("modules_to_save")
        saved |= {name for name in stated if isinstance(name, str)} if isinstance(stated, list) else set()
    tasks = [adapter.config.get("task_type") for adapter in adapters]
    return Adapter(
        folder=adapters[0].folder,
        format=AdapterFormat.COMBINATION,
        method=recipe.method,
        modules=tuple(item.combination for item in modules),
        replacements=replacements,
        config={
            "task_type": next((task for task in tasks if isinstance(task, str)), None),
            "target_modules": sorted(item.combination.name for item in modules if item.combination.is_matrix),
            "modules_to_save": sorted(saved) or None,
        },
        base_name=next((adapter.base_name for adapter in adapters if adapter.base_name), None),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        files=tuple(file for adapter in adapters for file in adapter.files),
        tied=any(adapter.tied for adapter in adapters),
        notes=recipe.notes,
    )
