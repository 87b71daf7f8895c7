"""Combine adapters and merge them: bound to one base, each with its own scales and norms, then one edit per tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .binding import BoundAdapter, BoundModule, bind
from .checkpoint import Checkpoint, open_checkpoint
from .combination import Part, Settings, combined, combined_form, key_of
from .devices import choose_device
from .edits import BlockEdit, Replaced, applied, in_turn
from .errors import InputError, Problem, UnsupportedError, raise_all
from .form import CanonicalForm
from .formats import ReadOptions, open_adapter
from .headers import FLOAT_DTYPES, TensorRef
from .lora import BiasModule, ExpertModule, LoraModule, PartModule
from .lora_folder import FoundFactors, write_lora_folder
from .output import MANIFEST, check_output, manifest, sha256, staged, write_json
from .recipe import Recipe
from .tensors import read_tensor
from .tokens import TokenModule
from .truncation import reduce_rank, truncate
from .vocabulary import EMBEDDINGS


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


def combine_factors(
    recipe: Recipe,
    output: str | Path,
    base: str | Path | None = None,
    *,
    rank: int | float | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the recipe's combination as one PEFT folder, with its error per weight.

    linear: without `rank` exact, the factors side by side and reduced to their numerical rank (QR, SVD of the core); a
    DoRA where an adapter has magnitudes. With `rank` (or an energy below 1), or any other method, a truncated LoRA of
    the dense combined delta. Raises UnsupportedError for what has no factors.
    """
    output = Path(output)
    combination = open_combination(recipe, base)
    check_output(output, overwrite, (combination.base.folder, *(b.adapter.folder for b in combination.adapters)))
    for bound in combination.adapters:
        bound.adapter.check_values()
    planned = combination.planned()[0]
    exact = recipe.settings.method == "linear" and rank is None
    if rank is None and not exact:
        raise InputError(
            f"a {recipe.settings.method} combination is of full rank", expected="--rank R or ENERGY, which truncates"
        )
    modules = combination.modules()
    problems = [
        Problem(f"{item.name}: {', '.join(bad)} brings more than factors here", hint="merge the combination instead")
        for item in modules
        if (bad := [s.adapter for s in item.shares if not _factorable(s)])
    ]
    raise_all(problems, UnsupportedError)
    chosen = choose_device(device)
    content = manifest("factors", _inputs(combination), {"rank": rank, "combination": recipe.as_json()})
    if dry_run:
        return content | {"dry_run": True}
    factors = [_combined_factors(item, rank, chosen) for item in modules]
    if any(item.magnitude is not None for item in factors):
        factors = [_with_magnitude(item, module) for item, module in zip(factors, modules, strict=True)]
    content["form"] = "lora+row_scale" if any(item.magnitude is not None for item in factors) else "lora"
    content["exact"] = exact
    content["layers"] = {item.module: {"rank": item.rank, "relative_error": item.relative_error} for item in factors}
    first = combination.adapters[0].adapter
    conv1d = any(module.transposed for item in modules for share in item.shares for module in share.modules)
    with staged(output, overwrite) as folder:
        heads = {name: read_tensor(ref) for name, ref in planned.replacements.items()}
        task = first.config.get("task_type")
        write_lora_folder(folder, factors, heads, first.base_name, task if isinstance(task, str) else None, conv1d)
        content["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        write_json(folder / MANIFEST, content)
    return content


def _factorable(share: Share) -> bool:
    """True for one adapted weight matrix, whole, whose norms are those of its output rows."""
    if share.replacement is not None or len(share.modules) != 1:
        return False
    bound = share.modules[0]
    module = bound.module
    if isinstance(module, TokenModule | BiasModule | ExpertModule | PartModule) or bound.rows is not None:
        return False
    magnitude = getattr(module, "magnitude", None) is not None or getattr(module, "own_magnitude", False)
    return not (magnitude and (getattr(module, "magnitude_dim", 0) == 1 or getattr(module, "embedding", False)))


def _combined_factors(item: CombinedModule, rank: int | float | None, device: torch.device) -> FoundFactors:
    bound = item.shares[0].modules[0]
    weight = bound.oriented_weight().to(device=device, dtype=torch.float64)
    forms = [share.modules[0].form(torch.float64).to(device) for share in item.shares]
    embedding = isinstance(bound.module, LoraModule) and bound.module.embedding
    if rank is None:
        form = combined_form(forms, [share.weight for share in item.shares], weight)
        up, down = reduce_rank(form.up, form.down)
        exact = sum((s.weight * f.delta(weight) for s, f in zip(item.shares, forms, strict=True)), weight * 0)
        mine = CanonicalForm(up.float().double(), down.float().double(), row_scale=form.row_scale)
        magnitude = None
        if form.row_scale is not None:
            norm = torch.linalg.vector_norm(torch.addmm(weight, mine.up, mine.down), dim=1)
            magnitude = (form.row_scale * norm).cpu()
        got = mine.delta(weight)
    else:
        # In the layout of the base, so that the same elements are drawn as in a merge.
        stored = weight.T.contiguous() if bound.transposed else weight
        ready = [form.bound_to(weight) for form in forms]
        parts = [
            Part(
                form.transposed() if bound.transposed else form,
                share.weight,
                share.density,
                key_of(item.settings.seed, share.adapter, item.name),
            )
            for form, share in zip(ready, item.shares, strict=True)
        ]
        edit = combined(parts, item.settings)
        exact = torch.zeros_like(stored) if edit is None else applied(edit, stored) - stored
        if bound.transposed:
            exact = exact.T.contiguous()
        if not bool(exact.any()):
            nothing = torch.zeros(sum(weight.shape), 1)
            return FoundFactors(
                item.name.removesuffix(".weight"),
                nothing[: weight.shape[0]],
                nothing[weight.shape[0] :].T,
                None,
                0.0,
                embedding,
            )
        up, down = truncate(exact, rank)
        got, magnitude = up @ down, None
    size = float(torch.linalg.vector_norm(exact))
    error = float(torch.linalg.vector_norm(got - exact)) / size if size else 0.0
    return FoundFactors(item.name.removesuffix(".weight"), up.cpu(), down.cpu(), magnitude, error, embedding)


def _with_magnitude(found: FoundFactors, item: CombinedModule) -> FoundFactors:
    """In a DoRA folder every weight has magnitudes: those that change nothing where there are none."""
    if found.magnitude is not None:
        return found
    weight = item.shares[0].modules[0].oriented_weight().to(torch.float64)
    norm = torch.linalg.vector_norm(torch.addmm(weight, found.up, found.down), dim=0 if found.embedding else 1)
    return replace(found, magnitude=norm)


def _inputs(combination: Combination) -> dict[str, Any]:
    from .merging import describe_inputs

    return describe_inputs(combination.adapters)
