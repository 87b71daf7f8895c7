"""Checks of the types in JSON files: each value of a wrong type is a problem that names its key.

A schema maps keys to kinds. A nested schema means an object with these keys, `Each(kind)` an object or list whose
values are all of one kind, `Stated(kind)` a required value. Keys that a schema does not name may hold any value, and
null means that an optional value is not stated. A file is checked once, when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from adapter_merge.errors import FileFormatError, Problem, raise_all

from .escaping import has_controls

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value."""

    name: str  # in errors
    holds: Callable[[Any], bool]  # True for a value of this kind


@dataclass(frozen=True)
class Each:
    """An object (or, with `listed`, a list) whose values are all of `kind`, and its keys of the kind `keys`."""

    kind: Any
    listed: bool = False
    keys: Kind | None = None


@dataclass(frozen=True)
class Stated:
    """A required value, which must not be null."""

    kind: Any


Schema: TypeAlias = Mapping[str, "Kind | Each | Stated | Schema"]

TEXT = Kind("a string", lambda value: isinstance(value, str))
NAME = Kind("one line of printable text", lambda value: isinstance(value, str) and not has_controls(value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a positive integer", lambda value: type(value) is int and 0 < value < 2**63)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and -1e308 < value < 1e308)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind(
    "a list of strings", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
)
PATH = Kind(
    "a path that the system can open",
    lambda value: (
        NAME.holds(value)
        and len(value.encode("utf-8", "replace")) < 4096
        and all(len(part.encode("utf-8", "replace")) < 256 for part in value.split("/"))
    ),
)


def check_types(content: Mapping[str, Any], schema: Schema, file: Path) -> None:
    """Raise FileFormatError with every value of `content`, read from `file`, that is not of the schema's kind."""
    problems = [
        Problem(f"{file}: {key} is not {kind}", kind, "nothing" if value is None else f"{value!r:.100}")
        for key, kind, value in _find_wrong(content, schema, "")
    ]
    raise_all(problems[:MAX_PROBLEMS], FileFormatError)


def _find_wrong(content: Mapping[str, Any], schema: Schema, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Yield key, expected kind and value of each wrong value of an object."""
    for key, kind in schema.items():
        if content.get(key) is not None:
            yield from _check_value(content[key], kind.kind if isinstance(kind, Stated) else kind, f"{prefix}{key}")
        elif isinstance(kind, Stated):
            yield f"{prefix}{key}", kind.kind.name if isinstance(kind.kind, Kind) else "stated", None


def _check_value(value: Any, kind: Kind | Each | Schema, key: str) -> Iterator[tuple[str, str, Any]]:
    """Yield key, expected kind and value of each wrong value in `value`."""
    if isinstance(kind, Kind):
        if not kind.holds(value):
            yield key, kind.name, value
    elif isinstance(kind, Each):
        if kind.listed != isinstance(value, list) or not isinstance(value, dict | list):
            yield key, "a list" if kind.listed else "an object", value
            return
        for name, item in enumerate(value) if isinstance(value, list) else value.items():
            if kind.keys is not None and not kind.keys.holds(name):
                yield f"a key of {key}", kind.keys.name, name
            yield from _check_value(item, kind.kind, f"{key}.{name}"[:200])
    elif not isinstance(value, dict):
        yield key, "an object", value
    else:
        yield from _find_wrong(value, kind, f"{key}.")


# Keys of a model's config.json that are read.

_LANGUAGE_MODEL: Schema = {
    "model_type": NAME,
    "architectures": TEXTS,
    "tie_word_embeddings": FLAG,
    "dtype": TEXT,
    "torch_dtype": TEXT,
    "relative_attention": FLAG,
    "share_att_key": FLAG,
    "pos_att_type": Kind("a string or a list of strings", lambda value: TEXT.holds(value) or TEXTS.holds(value)),
    "num_hidden_layers": COUNT,
    "hidden_size": COUNT,
    "vocab_size": COUNT,
    "head_dim": COUNT,
    "max_position_embeddings": NUMBER,
    "n_positions": COUNT,
    "rope_theta": NUMBER,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
}
MODEL_CONFIG: Schema = {**_LANGUAGE_MODEL, "_name_or_path": NAME, "auto_map": OBJECT, "text_config": _LANGUAGE_MODEL}
INDEX: Schema = {"weight_map": Each(PATH), "metadata": OBJECT}
