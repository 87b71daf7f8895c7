"""Inputs of a command: BASE and ADAPTER, or several adapters and how they are combined."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from .command import COMBINATION, option
from .hub import add_revision
from .input_checks import check_paths
from .stated_settings import read_single_stated, read_stated

if TYPE_CHECKING:
    from adapter_merge.combine.recipe import Ingredient, Recipe
    from adapter_merge.formats.stated_settings import ReadOptions

F = TypeVar("F", bound=Callable[..., Any])
META = "adapter_merge.combination"
NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<value>.+)")
METHODS = ("linear", "ties", "dare", "dare-ties", "magnitude-prune", "breadcrumbs")  # delta_ops.py needs torch
IN_TURN = "in-turn"
RECIPES = (".yaml", ".yml", ".json", ".toml")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
INPUTS = "BASE ADAPTER | BASE NAME=ADAPTER... | BASE FIRST SECOND..."


class Subject(NamedTuple):
    """Base and adapter of a command, or several adapters as a recipe, with the settings that the user stated."""

    base: str | None
    adapter: str | Recipe
    base_kind: str | None = None
    options: ReadOptions | None = None

    @property
    def folder(self) -> str:
        """The folder or hub id with the base's weights; empty where a recipe names none."""
        if self.base is not None or isinstance(self.adapter, str):
            return self.base or str(self.adapter)
        return self.adapter.base or ""


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(META, {})[parameter.name] = value


def combination_options(function: F) -> F:
    """Add the options for the combination of several adapters; `stated_inputs` reads their values."""
    for decorate in (
        option(
            "--recipe",
            type=click.Path(path_type=Path, dir_okay=False),
            help="A file with the combination in YAML, JSON or TOML, or in mergekit's YAML (linear, task_arithmetic); "
            "replaces NAME=ADAPTER and these options.",
        ),
        option("--seed", type=int, help="dare: seed of the random numbers; default: 0."),
        option("--gamma", type=float, help="breadcrumbs: share of the largest elements dropped."),
        option(
            "--density",
            multiple=True,
            metavar="[NAME=]NUMBER",
            help="Share of each delta's elements that is kept; default: 1. NAME= states it for one adapter.",
        ),
        option(
            "--combine",
            type=click.Choice((*METHODS, IN_TURN)),
            help="Method; default: linear. in-turn applies each adapter to the result of those before it.",
        ),
        option("--weight", multiple=True, metavar="NAME=NUMBER", help="Weight of an adapter; default: 1."),
    ):
        function = _add_to_context(decorate, function)
    return function


def _add_to_context(decorate: Callable[[F], F], function: F) -> F:
    """Apply `decorate`, with the option's value kept in the context and not passed to the function."""
    function = decorate(function)
    parameter = function.__click_params__[-1]  # type: ignore[attr-defined]
    parameter.section = COMBINATION
    parameter.expose_value = False
    parameter.callback = _keep
    return function


def has_combination() -> bool:
    """Return True where the running command has a recipe or another option for combinations."""
    return any(click.get_current_context().meta.get(META, {}).values())


def _named(text: str) -> tuple[str, str] | None:
    match = NAMED.fullmatch(text)
    return (match["name"], match["value"]) if match and not Path(text).exists() else None


def stated_inputs(inputs: tuple[str, ...]) -> Subject:
    """Return the inputs that a command's arguments and options state, checked without torch.

    CHECKPOINT                 a DCFT checkpoint, which holds its own base
    BASE ADAPTER               one adapter, with or without a NAME=
    BASE NAME=ADAPTER ...      several adapters, combined by the method of --combine
    BASE FIRST SECOND ...      several adapters in turn, each applied to the result of those before it
    --recipe FILE [BASE]       a recipe of this project, or mergekit's YAML
    FILE.yaml                  the same

    Raises UsageError for incomplete arguments, InputError for inputs that do not exist, MismatchError for swapped ones.
    """
    subject = _parse_inputs(inputs)
    subject = subject._replace(base=add_revision(subject.base))
    adapters = [subject.adapter] if isinstance(subject.adapter, str) else [i.path for i in subject.adapter.ingredients]
    check_paths(subject.base, *adapters)
    return subject


def adapter_bytes(subject: Subject) -> int:
    """Return the size of the adapters' weights files, the measure of a command's progress over them."""
    adapters = [subject.adapter] if isinstance(subject.adapter, str) else [i.path for i in subject.adapter.ingredients]
    files = [file for path in map(Path, adapters) for file in (path.iterdir() if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS and file.is_file())


def _parse_inputs(inputs: tuple[str, ...]) -> Subject:
    """Parse arguments and options into a `Subject`, without checking paths. Raises UsageError."""
    from adapter_merge.combine.combination_settings import Settings
    from adapter_merge.combine.recipe import make_recipe, read_recipe

    values = click.get_current_context().meta.get(META, {})
    file, weights, densities = values.get("recipe"), values.get("weight") or (), values.get("density") or ()
    given = {key: values[key] for key in ("combine", "gamma", "seed") if values.get(key) is not None}
    named = [pair for text in inputs[1:] if (pair := _named(text)) is not None]
    if file is None and inputs and Path(inputs[0]).suffix in RECIPES and Path(inputs[0]).is_file():
        file, inputs = Path(inputs[0]), inputs[1:]
    if file is not None:
        if named or weights or densities or given or len(inputs) > 1:
            raise click.UsageError(
                "--recipe excludes adapters, weights and the other options of a combination: state them in the file"
            )
        if read_single_stated() != (None, _no_options()):
            raise click.UsageError("--recipe excludes options of single adapters: state them in the file")
        return Subject(inputs[0] if inputs else None, read_recipe(file))
    if not inputs:
        raise click.UsageError(f"expected {INPUTS}")
    if named and len(named) != len(inputs) - 1:
        raise click.UsageError("either all adapters have names or none: BASE NAME=ADAPTER NAME=ADAPTER ...")
    if not named and len(inputs) <= 2:
        if weights or densities or given:
            raise click.UsageError("a combination needs BASE NAME=ADAPTER ...")
        return Subject(None if len(inputs) == 1 else inputs[0], inputs[-1], *read_single_stated())
    if not named:
        if weights or densities or given.get("combine", IN_TURN) != IN_TURN or given.keys() - {"combine"}:
            raise click.UsageError(
                "a combination needs names: BASE NAME=ADAPTER ...; adapters without names are applied in turn"
            )
        given["combine"] = IN_TURN
        named = _name_paths(inputs[1:])
    method = given.pop("combine", "linear")
    common = [text for text in densities if "=" not in text]
    if len(common) > 1:
        raise click.UsageError("--density is given twice")
    density = _parse_numbers("--density", [f"all={text}" for text in common]).get("all", 1.0)
    own = tuple(text for text in densities if "=" in text)
    recipe = make_recipe(_ingredients(named, weights, own), Settings(method, density, **given))
    return Subject(inputs[0], recipe)


def _no_options() -> ReadOptions:
    from adapter_merge.formats.stated_settings import ReadOptions

    return ReadOptions()


def named_inputs(texts: Sequence[str]) -> tuple[str, ...]:
    """Return every text as NAME=ADAPTER; an unnamed adapter gets its folder's name, with -2, -3, ... where taken."""
    taken = {pair[0] for text in texts if (pair := _named(text)) is not None}
    named = []
    for text in texts:
        if _named(text) is not None:
            named.append(text)
            continue
        stem = _stem(text)
        others = (f"{stem}-{number}" for number in range(2, len(texts) + 2))
        name = stem if stem not in taken else next(other for other in others if other not in taken)
        taken.add(name)
        named.append(f"{name}={text}")
    return tuple(named)


def _stem(path: str) -> str:
    """Return a valid adapter name from its folder or hub id; characters that a name cannot have become "-"."""
    stem = Path(path).name or Path(path).resolve().name
    return re.sub(r"[^A-Za-z0-9_.-]", "-", stem).lstrip(".-") or "adapter"


def _name_paths(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (name, path) of adapters without names."""
    return [(name, path) for name, _, path in (text.partition("=") for text in named_inputs(paths))]


def _parse_numbers(flag: str, texts: Sequence[str]) -> dict[str, float]:
    """Parse texts NAME=NUMBER; return the numbers by name. Raises UsageError."""
    numbers: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError as error:
            raise click.UsageError(f"{flag} {text}: expected NAME=NUMBER") from error
    return numbers


def _ingredients(
    named: list[tuple[str, str]], weights: tuple[str, ...], densities: tuple[str, ...]
) -> list[Ingredient]:
    from adapter_merge.combine.recipe import Ingredient, list_stated_options

    names = [name for name, _ in named]
    factors, shares = _parse_numbers("--weight", weights), _parse_numbers("--density", densities)
    for flag, numbers in (("--weight", factors), ("--density", shares)):
        unknown = sorted(numbers.keys() - set(names))
        if unknown:
            raise click.UsageError(
                f"{flag} names an unknown adapter: {', '.join(unknown)}; adapters: {', '.join(names)}"
            )
    stated = read_stated(names)
    return [
        Ingredient(
            name, path, factors.get(name, 1.0), shares.get(name), stated[name][0], list_stated_options(stated[name][1])
        )
        for name, path in named
    ]
