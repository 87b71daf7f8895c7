"""Stated settings of served adapters, which their files do not hold (alpha, base_kind, init_adapter, ...).

For adapters that are named on the command line they are options. For adapters of a folder, or loaded at run time, they
are in the file read_options.json beside the adapter's files:

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
    """The stated settings of one adapter: option name with underscores -> value; paths are Paths."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, base_kind: str | None, options: Any) -> Stated:
        """Return the settings from a base kind and ReadOptions, as `read_stated` returns them for an adapter."""
        values = {entry.name: getattr(options, entry.name) for entry in fields(options)}
        return cls({key: value for key, value in {"base_kind": base_kind, **values}.items() if value is not None})

    def with_defaults(self, defaults: Stated) -> Stated:
        """Return these settings, with those of `defaults` where none is stated."""
        return Stated({**defaults.values, **self.values})

    @property
    def base_kind(self) -> str | None:
        value = self.values.get("base_kind")
        return None if value is None else str(value)

    @property
    def options(self) -> Any:
        """The settings as ReadOptions."""
        from adapter_merge.formats.stated_settings import ReadOptions

        return ReadOptions(**{key: value for key, value in self.values.items() if key != "base_kind"})

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files and folders that are read in addition to the adapter's own."""
        return tuple(value for key, value in sorted(self.values.items()) if KINDS[key][0] == PATH)

    def identity(self) -> dict[str, Any]:
        """Return the settings as JSON values for a cache key: files by their sha256, so paths have no effect."""
        return {key: _hash_content(value) if KINDS[key][0] == PATH else value for key, value in self.values.items()}


def flags_of(stated: Mapping[str, Any]) -> list[str]:
    """Return stated settings, as JSON holds them, as arguments of a command line."""
    words = []
    for key, value in stated.items():
        flag = f"--{key.replace('_', '-')}"
        words += ([flag] if value else []) if KINDS[key][0] == FLAG else [f"{flag}={value}"]
    return words


def check_settings(values: Mapping[str, Any], folder: Path | None = None, source: str = "") -> Stated:
    """Return `values` as Stated. Raises InputError with every unknown key and wrong value.

    folder: paths are relative to it and must stay inside it, also after links are resolved. source: begins each
    problem's message.
    """
    problems, good = [], {}
    for key, value in values.items():
        if key not in KINDS:
            problems.append(Problem(f"{source}unknown key {key!r:.60}", ", ".join(KINDS)))
            continue
        kind, choices = KINDS[key]
        names = {NUMBER: "a number", FLAG: "true or false", PATH: "a path", CHOICE: ", ".join(choices)}
        expected = names.get(kind, "a text")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if kind == NUMBER:
            right = is_number
        elif kind == FLAG:
            right = isinstance(value, bool)
        else:
            right = isinstance(value, str | Path if kind == PATH else str) and (kind != CHOICE or value in choices)
        if not right:
            problems.append(Problem(f"{source}{key} is wrong", expected, repr(value)[:100]))
        elif kind != PATH:
            good[key] = float(value) if kind == NUMBER else value
        elif folder is None:
            good[key] = Path(value)
        elif _is_inside(folder, folder / value):
            good[key] = folder / value
        else:
            problems.append(Problem(f"{source}{key} is not in the adapter's folder", f"a path under {folder}", value))
    raise_all(problems, InputError)
    return Stated(good)


def read_settings_beside(adapter: Path) -> Stated:
    """Return the settings in read_options.json of the folder `adapter`; none where there is no such file.

    Raises AdapterError or InputError where the file cannot be read or holds a wrong value.
    """
    from adapter_merge.storage.checkpoint import read_json

    file = adapter / FILE
    if not file.is_file():
        return Stated()
    content = read_json(file)
    if not isinstance(content, dict):
        raise AdapterError(f"{file}: not a JSON object", expected=", ".join(KINDS))
    return check_settings(content, adapter, f"{file}: ")


def _is_inside(folder: Path, path: Path) -> bool:
    """Return True for an existing path under `folder` that holds no link out of it."""
    root = folder.resolve()
    parts = (path, *path.rglob("*")) if path.is_dir() else (path,)
    return path.exists() and all(part.resolve().is_relative_to(root) for part in parts)


def _hash_content(path: Path) -> dict[str, str]:
    """Return file name -> sha256 of a file, or of all files in a folder."""
    from adapter_merge.files.hashing import file_sha256

    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return {file.name: file_sha256(file) for file in files}
