"""Combine adapters and merge them: bound to one base, each with its own scales and norms, then one edit per tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .binding import EMBEDDINGS, BoundAdapter, BoundModule, bind
from .checkpoint import Checkpoint, open_checkpoint
from .combination import Part, Settings, combined, key_of
from .edits import BlockEdit, Replaced, in_turn
from .errors import InputError, Problem, raise_all
from .formats import ReadOptions, open_adapter
from .headers import FLOAT_DTYPES, TensorRef
from .recipe import Recipe
from .tokens import TokenModule


@dataclass(frozen=True)
class Share:
    """What one adapter does to one tensor, and how much of it is taken."""

    adapter: str
    weight: float
    density: float
    modules: tuple[BoundModule, ...]
    replacement: TensorRef | None = None

    def edit(self, dtype: torch.dtype) -> BlockEdit:
        """The adapter's whole effect on the tensor, as the base stores it."""
        edits: list[BlockEdit] = [Replaced(self.replacement)] if self.replacement is not None else []
        return in_turn([*edits, *(module.stored_edit(dtype) for module in self.modules)])


@dataclass(frozen=True)
class CombinedModule:
    """One tensor that one or more adapters change. Stands where the plan expects a bound module."""

    name: str
    weight: TensorRef
    shares: tuple[Share, ...]
    settings: Settings

    def stored_edit(self, dtype: torch.dtype = torch.float32) -> BlockEdit:
        """The combination. Never empty: the plan leaves tensors out that nothing changes."""
        parts = [
            Part(share.edit(dtype), share.weight, share.density, key_of(self.settings.seed, share.adapter, self.name))
            for share in self.shares
        ]
        edit = combined(parts, self.settings)
        assert edit is not None
        return edit


@dataclass(frozen=True)
class Combination:
    """Adapters bound to one base, and the recipe; `planned` is what the merge plan is made from."""

    adapters: tuple[BoundAdapter, ...]  # in the order of the recipe's ingredients
    recipe: Recipe

    @property
    def base(self) -> Checkpoint:
        return self.adapters[0].base

    def modules(self) -> tuple[CombinedModule, ...]:
        """Every tensor that changes. Raises InputError where adapters cannot go together."""
        shares: dict[str, list[Share]] = {}
        weights: dict[str, TensorRef] = {}
        problems = []
        for item, bound in zip(self.recipe.ingredients, self.adapters, strict=True):
            density = self.recipe.settings.density if item.density is None else item.density
            if item.weight == 0:
                continue
            grouped: dict[str, list[BoundModule]] = {}
            for module in bound.modules:
                grouped.setdefault(module.name, []).append(module)
            for name, modules in grouped.items():
                ref = modules[0].weight
                if weights.setdefault(name, ref) != ref:
                    problems.append(
                        Problem(
                            f"{name}: the adapters were trained on different versions of it",
                            hint="combine adapters of one vocabulary size",
                        )
                    )
                shares.setdefault(name, []).append(Share(item.name, item.weight, density, tuple(modules)))
            for name, ref in bound.replacements.items():
                old = self.base.tensors.get(name)
                if old is None or old.shape != ref.shape or not ref.shape or ref.dtype not in FLOAT_DTYPES:
                    continue  # taken as it is: see `planned`
                if weights.setdefault(name, old) != old or any(s.adapter == item.name for s in shares.get(name, ())):
                    problems.append(Problem(f"{name} is adapted and replaced at once by {item.name!r}"))
                shares.setdefault(name, []).append(Share(item.name, item.weight, density, (), ref))
        raise_all(problems, InputError)
        return tuple(
            CombinedModule(name, weights[name], tuple(found), self.recipe.settings) for name, found in shares.items()
        )

    def planned(self) -> tuple[BoundAdapter, ...]:
        """The adapters as one, for the plan. Raises InputError where adapters cannot go together."""
        modules = self.modules()
        problems: list[Problem] = []
        taken: dict[str, tuple[str, TensorRef]] = {}
        changes: dict[str, Any] = {}
        copies: dict[str, TensorRef] = {}
        for item, bound in zip(self.recipe.ingredients, self.adapters, strict=True):
            if item.weight == 0:
                continue
            for name, ref in bound.replacements.items():
                old = self.base.tensors.get(name)
                if old is not None and old.shape == ref.shape and ref.shape and ref.dtype in FLOAT_DTYPES:
                    continue
                if name in taken or any(module.name == name for module in modules):
                    problems.append(
                        Problem(
                            f"{name}: {item.name!r} and another adapter both bring one, and the base has none like it",
                            hint="a tensor without a base has no delta to combine: drop one",
                        )
                    )
                taken[name] = (item.name, ref)
            for key, value in bound.config_changes.items():
                if changes.setdefault(key, value) != value:
                    problems.append(Problem(f"the adapters disagree about {key}", got=f"{changes[key]} and {value}"))
            copies |= bound.copies
        if changes.get("tie_word_embeddings") is False:
            problems += self._tied_tokens()
        raise_all(problems, InputError)
        first = self.adapters[0]
        return (
            replace(
                first,
                modules=modules,  # type: ignore[arg-type]
                replacements={name: ref for name, (_, ref) in taken.items()},
                copies=copies,
                config_changes=changes,
            ),
        )

    def _tied_tokens(self) -> list[Problem]:
        """An adapter whose trained tokens reach the head through the tie that another adapter cuts."""
        return [
            Problem(f"{item.name!r} trained tokens of tied embeddings, and another adapter unties them")
            for item, bound in zip(self.recipe.ingredients, self.adapters, strict=True)
            if "tie_word_embeddings" not in bound.config_changes
            and any(isinstance(m.module, TokenModule) and m.name.endswith(EMBEDDINGS) for m in bound.modules)
        ]


def open_combination(recipe: Recipe, base: str | Path | None = None) -> Combination:
    """Every adapter of `recipe` bound to its base, or to `base`. Raises AdapterMergeError."""
    chosen = base if base is not None else recipe.base
    if chosen is None:
        raise InputError("a combination needs its base", expected="BASE NAME=ADAPTER ..., or base in the recipe")
    checkpoint = open_checkpoint(chosen)
    bound = []
    for item in recipe.ingredients:
        options = ReadOptions(**(item.options or {}))
        opened = bind(open_adapter(item.path, options, checkpoint), checkpoint, item.base_kind)
        if opened.base_kind == "residual":
            raise InputError(
                f"{item.name!r} was trained on the residual that the base is: others were not",
                hint="combine on the original base",
            )
        bound.append(opened)
    return Combination(tuple(bound), recipe)


def combine(recipe: Recipe, output: str | Path, base: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Write the base with the recipe's combination merged into it; `options` as of merging.merge_bound."""
    from .merging import merge_bound

    combination = open_combination(recipe, base)
    return merge_bound(combination.adapters, output, combination=combination, **options)
