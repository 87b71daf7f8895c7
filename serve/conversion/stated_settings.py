"""Stated options of served adapters: what an adapter's files do not hold (alpha, base_kind, init_adapter, ...).

For adapters that are named on the command line the options say it. For adapters that are found or loaded at run time
a file beside theirs does, read_options.json:

    {"alpha": 32, "base_kind": "original", "init_adapter": "before-training"}

Keys are the options' names with underscores; a path is relative to the adapter's folder and stays inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from adapter_merge.cli.options.stated_settings import CHOICE, FLAG, NUMBER, OPTIONS, PATH
from adapter_merge.errors import AdapterError, InputError, Problem, raise_all

FILE = "read_options.json"
KINDS = {option.removeprefix("--").replace("-", "_"): (kind, choices) for option, kind, choices, _ in OPTIONS}


@dataclass(frozen=True)
class Stated:
    """What was said of one adapter: the options' names, with underscores -> values; paths are Paths."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, base_kind: str | None, options: Any) -> Stated:
        """From what `read_stated` returns for an adapter."""
        values = {entry.name: getattr(options, entry.name) for entry in fields(options)}
        return cls({key: value for key, value in {"base_kind": base_kind, **values}.items() if value is not None})

    def over(self, other: Stated) -> Stated:
        """This, and from `other` what is not said here."""
        return Stated({**other.values, **self.values})

    @property
    def base_kind(self) -> str | None:
        value = self.values.get("base_kind")
        return None if value is None else str(value)

    @property
    def options(self) -> Any:
        """The same as merge.formats.ReadOptions."""
        from adapter_merge.formats.stated_settings import ReadOptions

        return ReadOptions(**{key: value for key, value in self.values.items() if key != "base_kind"})

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files and folders that are read beside the adapter's own."""
        return tuple(value for key, value in sorted(self.values.items()) if KINDS[key][0] == PATH)

    def identity(self) -> dict[str, Any]:
        """What a conversion depends on, as JSON: files by their content, so that it does not matter where they are."""
        return {key: _content(value) if KINDS[key][0] == PATH else value for key, value in self.values.items()}


def flags_of(stated: Mapping[str, Any]) -> list[str]:
    """Stated options as words of a command line, from JSON: paths are texts there."""
    words = []
    for key, value in stated.items():
        flag = f"--{key.replace('_', '-')}"
        words += ([flag] if value else []) if KINDS[key][0] == FLAG else [f"{flag}={value}"]
    return words


def checked(values: Mapping[str, Any], folder: Path | None = None, where: str = "") -> Stated:
    """`values` as Stated. Raises InputError with every unknown key and wrong value.

    With `folder`, paths are relative to it and may not leave it, by a link neither.
    """
    problems, good = [], {}
    for key, value in values.items():
        if key not in KINDS:
            problems.append(Problem(f"{where}unknown key {key!r:.60}", ", ".join(KINDS)))
            continue
        kind, choices = KINDS[key]
        names = {NUMBER: "a number", FLAG: "true or false", PATH: "a path", CHOICE: ", ".join(choices)}
        wanted = names.get(kind, "a text")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if kind == NUMBER:
            right = is_number
        elif kind == FLAG:
            right = isinstance(value, bool)
        else:
            right = isinstance(value, str | Path if kind == PATH else str) and (kind != CHOICE or value in choices)
        if not right:
            problems.append(Problem(f"{where}{key} is wrong", wanted, repr(value)[:100]))
        elif kind != PATH:
            good[key] = float(value) if kind == NUMBER else value
        elif folder is None:
            good[key] = Path(value)
        elif _stays(folder, folder / value):
            good[key] = folder / value
        else:
            problems.append(Problem(f"{where}{key} is not in the adapter's folder", f"a path under {folder}", value))
    raise_all(problems, InputError)
    return Stated(good)


def beside(adapter: Path) -> Stated:
    """What read_options.json in the folder `adapter` says; nothing where there is none.

    Raises AdapterError or InputError when it cannot be read or says something wrong.
    """
    from adapter_merge.storage.checkpoint import read_json

    file = adapter / FILE
    if not file.is_file():
        return Stated()
    content = read_json(file)
    if not isinstance(content, dict):
        raise AdapterError(f"{file}: not a map", expected=", ".join(KINDS))
    return checked(content, adapter, f"{file}: ")


def _stays(folder: Path, path: Path) -> bool:
    """True for an existing path under `folder`, no part of which is a link out of it."""
    root = folder.resolve()
    parts = (path, *path.rglob("*")) if path.is_dir() else (path,)
    return path.exists() and all(part.resolve().is_relative_to(root) for part in parts)


def _content(path: Path) -> dict[str, str]:
    from adapter_merge.outputs.staging import sha256

    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return {file.name: sha256(file) for file in files}
