"""The inputs of a command: BASE and ADAPTER, or several adapters and the way in which they are combined."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from .adapters import one_stated, stated_of
from .command import COMBINATION, option
from .hub import revised
from .input_paths import check_paths

if TYPE_CHECKING:
    from adapter_merge.combine.recipe import Ingredient, Recipe
    from adapter_merge.formats.read_options import ReadOptions

F = TypeVar("F", bound=Callable[..., Any])
META = "adapter_merge.combination"
NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<value>.+)")
METHODS = ("linear", "ties", "dare", "dare-ties", "magnitude-prune", "breadcrumbs")  # delta_ops.py needs torch
IN_TURN = "in-turn"
RECIPES = (".yaml", ".yml", ".json", ".toml")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
INPUTS = "BASE ADAPTER | BASE NAME=ADAPTER... | BASE FIRST SECOND..."


class Subject(NamedTuple):
    """Base and adapter of a command, or several adapters as a recipe, with all that was stated of them."""

    base: str | None
    adapter: str | Recipe
    base_kind: str | None = None
    options: ReadOptions | None = None

    @property
    def folder(self) -> str:
        """Where the base's weights are."""
        if self.base is not None or isinstance(self.adapter, str):
            return self.base or str(self.adapter)
        return self.adapter.base or ""


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(META, {})[parameter.name] = value


def combination_options(function: F) -> F:
    """How several adapters go together. The values are kept for `stated_inputs`."""
    for decorate in (
        option(
            "--recipe",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The combination as YAML, JSON or TOML, or mergekit's YAML where it means the same (linear, "
            "task_arithmetic); in place of NAME=ADAPTER and these options.",
        ),
        option("--seed", type=int, help="dare: of the random numbers; 0 when not given."),
        option("--gamma", type=float, help="breadcrumbs: share of the largest elements dropped."),
        option(
            "--density",
            multiple=True,
            metavar="[NAME=]NUMBER",
            help="Share of each delta's elements kept; 1 when not given. May differ from adapter to adapter.",
        ),
        option(
            "--combine",
            type=click.Choice((*METHODS, IN_TURN)),
            help="How; linear when not given. in-turn: each on what the ones before it have left.",
        ),
        option("--weight", multiple=True, metavar="NAME=NUMBER", help="An adapter's weight; 1 when not given."),
    ):
        function = _hidden(decorate, function)
    return function


def _hidden(decorate: Callable[[F], F], function: F) -> F:
    """Apply `decorate` so that its value goes to the context, not to the function."""
    function = decorate(function)
    parameter = function.__click_params__[-1]  # type: ignore[attr-defined]
    parameter.section = COMBINATION
    parameter.expose_value = False
    parameter.callback = _keep
    return function


def has_combination() -> bool:
    """True when the running command was given a recipe, or how adapters go together."""
    return any(click.get_current_context().meta.get(META, {}).values())


def _named(text: str) -> tuple[str, str] | None:
    match = NAMED.fullmatch(text)
    return (match["name"], match["value"]) if match and not Path(text).exists() else None


def stated_inputs(inputs: tuple[str, ...]) -> Subject:
    """What the arguments and options of a command say, checked without torch.

    CHECKPOINT                 a DCFT checkpoint, which holds its own base
    BASE ADAPTER               one adapter, with or without a NAME=
    BASE NAME=ADAPTER ...      combined in delta space, or as --combine says
    BASE FIRST SECOND ...      in turn: each on what the ones before it have left
    --recipe FILE [BASE]       what the file says; a recipe of this project, or mergekit's YAML
    FILE.yaml                  the same

    Raises UsageError for half of it, InputError for inputs that are not there or are swapped.
    """
    subject = _subject(inputs)
    subject = subject._replace(base=revised(subject.base))
    adapters = [subject.adapter] if isinstance(subject.adapter, str) else [i.path for i in subject.adapter.ingredients]
    check_paths(subject.base, *adapters)
    return subject


def adapter_bytes(subject: Subject) -> int:
    """Return the size of the adapters' weights files, the measure of a command's progress over them."""
    adapters = [subject.adapter] if isinstance(subject.adapter, str) else [i.path for i in subject.adapter.ingredients]
    files = [file for path in map(Path, adapters) for file in (path.iterdir() if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS and file.is_file())


def _subject(inputs: tuple[str, ...]) -> Subject:
    from adapter_merge.combine.recipe import make_recipe, read_recipe
    from adapter_merge.combine.settings import Settings

    said = click.get_current_context().meta.get(META, {})
    file, weights, densities = said.get("recipe"), said.get("weight") or (), said.get("density") or ()
    given = {key: said[key] for key in ("combine", "gamma", "seed") if said.get(key) is not None}
    named = [pair for text in inputs[1:] if (pair := _named(text)) is not None]
    if file is None and inputs and Path(inputs[0]).suffix in RECIPES and Path(inputs[0]).is_file():
        file, inputs = Path(inputs[0]), inputs[1:]
    if file is not None:
        if named or weights or densities or given or len(inputs) > 1:
            raise click.UsageError("--recipe says it all: leave out adapters, weights and the other options")
        if one_stated() != (None, _no_options()):
            raise click.UsageError("--recipe says it all: state what the files do not say in it, adapter by adapter")
        return Subject(inputs[0] if inputs else None, read_recipe(file))
    if not inputs:
        raise click.UsageError(f"expected {INPUTS}")
    if named and len(named) != len(inputs) - 1:
        raise click.UsageError("give every adapter a name: BASE NAME=ADAPTER NAME=ADAPTER ...")
    if not named and len(inputs) <= 2:
        if weights or densities or given:
            raise click.UsageError("a combination needs BASE NAME=ADAPTER ...")
        return Subject(None if len(inputs) == 1 else inputs[0], inputs[-1], *one_stated())
    if not named:
        if weights or densities or given.get("combine", IN_TURN) != IN_TURN or given.keys() - {"combine"}:
            raise click.UsageError(
                "a combination needs names: BASE NAME=ADAPTER ...; without them, adapters go in turn"
            )
        given["combine"] = IN_TURN
        named = _called(inputs[1:])
    method = given.pop("combine", "linear")
    common = [text for text in densities if "=" not in text]
    if len(common) > 1:
        raise click.UsageError("--density is given twice")
    density = _numbers("--density", [f"all={text}" for text in common]).get("all", 1.0)
    own = tuple(text for text in densities if "=" in text)
    recipe = make_recipe(_ingredients(named, weights, own), Settings(method, density, **given))
    return Subject(inputs[0], recipe)


def _no_options() -> ReadOptions:
    from adapter_merge.formats.read_options import ReadOptions

    return ReadOptions()


def named_inputs(texts: Sequence[str]) -> tuple[str, ...]:
    """Return every text as NAME=ADAPTER: an adapter without a name gets its folder's, the second of it -2."""
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
    """Return the name of an adapter's folder or hub id, without what a name may not hold."""
    stem = Path(path).name or Path(path).resolve().name
    return re.sub(r"[^A-Za-z0-9_.-]", "-", stem).lstrip(".-") or "adapter"


def _called(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (name, path) of adapters without names."""
    return [(name, path) for name, _, path in (text.partition("=") for text in named_inputs(paths))]


def _numbers(flag: str, texts: Sequence[str]) -> dict[str, float]:
    """NAME=NUMBER, by name."""
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
    from adapter_merge.combine.recipe import Ingredient, given_options

    names = [name for name, _ in named]
    factors, shares = _numbers("--weight", weights), _numbers("--density", densities)
    for flag, said in (("--weight", factors), ("--density", shares)):
        unknown = sorted(said.keys() - set(names))
        if unknown:
            raise click.UsageError(f"{flag} names no adapter: {', '.join(unknown)}; there are {', '.join(names)}")
    stated = stated_of(names)
    return [
        Ingredient(
            name, path, factors.get(name, 1.0), shares.get(name), stated[name][0], given_options(stated[name][1])
        )
        for name, path in named
    ]
