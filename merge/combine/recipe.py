"""Recipes: the adapters to combine and the settings, from flags or a YAML, JSON or TOML file. Unknown keys are errors.

    method: ties              # linear, ties, dare, dare-ties, magnitude-prune, breadcrumbs, or in-turn
    density: 0.5              # share of elements kept; also per adapter
    gamma: 0.01               # breadcrumbs: share of largest elements dropped
    seed: 0
    base: path/or/hub-id      # optional where the command line states it
    adapters:
      - {name: style, path: adapters/style, weight: 0.7}
      - {name: json, path: adapters/json, weight: 0.3, density: 0.8}

An adapter may also state what its files do not hold: alpha, ranknum, base_kind, format, prefix, magnitude_axis,
residual_dtype, init_adapter, magnitudes, force. Paths are relative to the file.

in-turn applies each adapter to the result of those before it (an adapter that was trained on a merged model): the order
matters, and weights and densities are refused.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import FileFormatError, InputError, MissingDependencyError, Problem, raise_all
from adapter_merge.files.json_types import NAME, PATH

from .combination_settings import METHODS, Settings
from .mergekit import from_mergekit, is_mergekit, output_dtype

if TYPE_CHECKING:
    from adapter_merge.formats.stated_settings import ReadOptions

IN_TURN = "in-turn"
KEYS = ("method", "density", "gamma", "seed", "base", "adapters")
PATH_KEYS = ("init_adapter", "magnitudes")
NUMBER_KEYS = ("alpha", "ranknum")
OPTION_KEYS = (*NUMBER_KEYS, "format", "prefix", "magnitude_axis", "residual_dtype", "trained_on", "force", *PATH_KEYS)
CHOICES = {"magnitude_axis": ("out", "in"), "residual_dtype": ("float32", "bfloat16", "float16")}
ADAPTER_KEYS = ("name", "path", "weight", "density", "base_kind", *OPTION_KEYS)


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a combination, with its weight and settings.

    Example:
        >>> Ingredient("style", "adapters/style", weight=0.7).density is None
        True
    """

    name: str
    path: str
    weight: float = 1.0  # factor of the adapter's delta
    density: float | None = None  # share of elements kept, above 0 to 1; None: that of the recipe
    base_kind: str | None = None  # PiSSA, DuDe: "original" or "residual"; None: decided by the base's weights
    options: Mapping[str, Any] | None = None  # fields of ReadOptions


@dataclass(frozen=True)
class Recipe:
    """The adapters to combine and the settings.

    Ingredients are sorted by name, so that the order in which they are given has no effect; in-turn keeps that order.

    Example:
        >>> recipe = make_recipe([Ingredient("a", "adapter", 0.5), Ingredient("b", "adapter", 0.5)], Settings())
        >>> merge("base", recipe, "combined").adapters[1].name
        'b'
    """

    ingredients: tuple[Ingredient, ...]
    settings: Settings
    base: str | None = None  # folder or hub id; None where the caller states the base
    dtype: str | None = None  # of the merged model, where a mergekit file states it

    @property
    def in_turn(self) -> bool:
        """True where each adapter is applied to the result of those before it."""
        return self.settings.method == IN_TURN

    @property
    def method(self) -> str:
        """The display name of the combination."""
        return "adapters in turn" if self.in_turn else f"{self.settings.method} combination"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on settings that have no effect."""
        settings, notes = self.settings, []
        densities = {settings.density if item.density is None else item.density for item in self.ingredients}
        if densities == {1} and settings.method not in ("linear", IN_TURN) and not settings.gamma:
            effect = "only the signs are elected" if settings.elects else "the result is that of linear"
            notes.append(f"{settings.method} with a density of 1 drops nothing, {effect}: state a density below 1")
        if settings.seed and not settings.random:
            notes.append(f"the seed has no effect: {settings.method} draws no random numbers")
        return tuple(notes)

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values for the manifest."""
        return {
            "method": self.settings.method,
            "density": self.settings.density,
            "gamma": self.settings.gamma,
            "seed": self.settings.seed,
            "adapters": [item.name for item in self.ingredients],
            "weights": {item.name: item.weight for item in self.ingredients},
            "densities": {item.name: item.density for item in self.ingredients if item.density is not None},
        }


def make_recipe(ingredients: Sequence[Ingredient], settings: Settings, base: str | None = None) -> Recipe:
    """Check the values and return a recipe. Raises InputError with every problem.

    Example:
        >>> make_recipe([Ingredient("style", "adapters/style", 0.7)], Settings("ties", density=0.5)).method
        'ties combination'
    """
    problems = []
    names = [item.name for item in ingredients]
    if not ingredients:
        problems.append(Problem("a combination needs adapters", expected="NAME=ADAPTER ..."))
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(f"two adapters are called {name!r}", hint="give each its own NAME=ADAPTER"))
    if settings.method not in (*METHODS, IN_TURN):
        problems.append(Problem("unknown method of combination", ", ".join((*METHODS, IN_TURN)), repr(settings.method)))
    for item in ingredients:
        if not _is_number(item.weight) or abs(item.weight) > 1e6:
            problems.append(Problem(f"the weight of {item.name!r} is wrong", "a number", repr(item.weight)))
        if item.base_kind not in (None, "original", "residual"):
            problems.append(
                Problem(f"the base_kind of {item.name!r} is wrong", "original, residual", repr(item.base_kind))
            )
    for owner, density in [("", settings.density), *((f" of {i.name!r}", i.density) for i in ingredients)]:
        if density is not None and (not _is_number(density) or not 0 < density <= 1):
            problems.append(Problem(f"the density{owner} is wrong", "above 0, at most 1", repr(density)))
    if not _is_number(settings.gamma) or not 0 <= settings.gamma < 1:
        problems.append(Problem("gamma is wrong", "0 or more, below 1", repr(settings.gamma)))
    elif settings.gamma and settings.method != "breadcrumbs":
        problems.append(Problem("gamma applies to breadcrumbs only", got=f"gamma with {settings.method}"))
    if settings.method in ("linear", IN_TURN) and (
        settings.density != 1 or any(i.density not in (None, 1, 1.0) for i in ingredients)
    ):
        problems.append(
            Problem(f"a density does not apply to {settings.method}", hint="use magnitude-prune, dare or ties")
        )
    if settings.method == IN_TURN and any(item.weight != 1 for item in ingredients):
        problems.append(Problem("weights do not apply to in-turn", hint="linear weighs deltas on the original base"))
    if isinstance(settings.seed, bool) or not isinstance(settings.seed, int) or abs(settings.seed) >= 1 << 63:
        problems.append(Problem("the seed is wrong", "a whole number of 64 bits", repr(settings.seed)))
    raise_all(problems, InputError)
    if settings.method != IN_TURN:
        ingredients = sorted(ingredients, key=lambda item: item.name)
    return Recipe(tuple(ingredients), settings, base)


def list_stated_options(options: ReadOptions) -> dict[str, Any]:
    """Return the options that are not None, by name, as `Ingredient.options` holds them."""
    return {key: value for key, value in vars(options).items() if value is not None}


def read_recipe(file: str | Path) -> Recipe:
    """Read a recipe from a YAML, JSON or TOML file, or from a mergekit configuration.

    Raises FileFormatError for a file that cannot be parsed, InputError with every problem of its values,
    MissingDependencyError for YAML without pyyaml.

    Example:
        >>> from pathlib import Path
        >>> text = '{"method": "linear", "adapters": [{"name": "style", "path": "adapter", "weight": 0.7}]}'
        >>> written = Path("recipe.json").write_text(text)
        >>> read_recipe("recipe.json").ingredients[0].weight
        0.7
    """
    path = Path(file)
    content = _read_content(path)
    dtype = None
    if is_mergekit(content):
        dtype = output_dtype(content)
        if dtype not in (None, *CHOICES["residual_dtype"]):
            raise InputError(f"{path}: dtype is wrong", expected=", ".join(CHOICES["residual_dtype"]), got=dtype)
        content = from_mergekit(content, path)
    problems = [Problem(f"{path}: unknown key {key!r}", ", ".join(KEYS)) for key in content if key not in KEYS]
    entries = content.get("adapters")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Problem(f"{path}: adapters is missing or wrong", "a list of {name, path, weight}"))
        entries = []
    ingredients = []
    for number, entry in enumerate(entries, 1):
        ingredient = _read_ingredient(entry, path.parent, f"{path}: adapter {number}", problems)
        if ingredient is not None:
            ingredients.append(ingredient)
    base = content.get("base")
    if base is not None and not PATH.holds(base):
        problems.append(Problem(f"{path}: base is wrong", "a folder or hub id", repr(base)[:100]))
    raise_all(problems, InputError)
    if isinstance(base, str) and (path.parent / base).exists():
        base = str(path.parent / base)
    settings = Settings(
        content.get("method", "linear"), content.get("density", 1.0), content.get("gamma", 0.0), content.get("seed", 0)
    )
    return replace(make_recipe(ingredients, settings, base), dtype=dtype)


def _read_ingredient(entry: Mapping[str, Any], folder: Path, owner: str, problems: list[Problem]) -> Ingredient | None:
    """Return the ingredient of one entry of `adapters`; None without a usable path and name. Adds to `problems`.

    Paths are relative to `folder`; `owner` begins each problem's message.
    """
    problems += [
        Problem(f"{owner}: unknown key {key!r}", ", ".join(ADAPTER_KEYS)) for key in entry if key not in ADAPTER_KEYS
    ]
    path = entry.get("path")
    if not PATH.holds(path) or not path:
        problems.append(Problem(f"{owner}: path is missing or wrong", "a folder, file or hub id"))
        return None
    name = entry.get("name", Path(path).name)
    if not NAME.holds(name) or not name:
        problems.append(Problem(f"{owner}: name is wrong", "a text", repr(name)[:100]))
        return None
    problems += _check_options(entry, owner)
    options = {key: entry[key] for key in OPTION_KEYS if entry.get(key) is not None}
    for key in PATH_KEYS:
        if isinstance(options.get(key), str):
            options[key] = folder / options[key]
    local = folder / path
    return Ingredient(
        name,
        str(local) if local.exists() else path,
        entry.get("weight", 1.0),
        entry.get("density"),
        entry.get("base_kind"),
        options,
    )


def _check_options(entry: Mapping[str, Any], owner: str) -> list[Problem]:
    """Return a problem for each value that is not a number, not a text or not one of the choices."""
    problems = []
    for key in OPTION_KEYS:
        value = entry.get(key)
        if value is None:
            continue
        if key in NUMBER_KEYS and not _is_number(value):
            problems.append(Problem(f"{owner}: {key} is wrong", "a number", repr(value)[:100]))
        elif key == "force" and not isinstance(value, bool):
            problems.append(Problem(f"{owner}: {key} is wrong", "true or false", repr(value)[:100]))
        elif key in (*NUMBER_KEYS, "force"):
            continue
        elif not (isinstance(value, str) and value in CHOICES.get(key, (value,))):
            problems.append(
                Problem(f"{owner}: {key} is wrong", ", ".join(CHOICES.get(key, ("a text",))), repr(value)[:100])
            )
    return problems


def _read_content(path: Path) -> dict[str, Any]:
    """Parse a recipe file by its suffix. Raises FileFormatError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: cannot be read ({error})") from error
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix == ".toml":
            content = tomllib.loads(text)
        else:
            content = _parse_yaml(text)
        json.dumps(content, ensure_ascii=False, default=str).encode("utf-8")  # refuses lone surrogates, not UTF-8
    except MissingDependencyError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not a recipe ({str(error)[:300]})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FileFormatError(f"{path}: not a recipe", expected=f"a map with {', '.join(KEYS)}")
    return {key: value for key, value in content.items() if value is not None}


def _parse_yaml(text: str) -> Any:
    """Parse YAML. Raises MissingDependencyError without pyyaml, ValueError for broken text."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError(
            "a YAML recipe needs pyyaml", hint="pip install pyyaml, or write it as JSON"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
