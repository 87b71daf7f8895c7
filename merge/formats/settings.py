"""The settings of an adapter's config that a reader knows. It is an allow list: an unknown one may change the weights.

Every key of a config is one of four:

read       the reader takes it into account;
ignored    it says how the adapter was trained or loaded, and has no effect on the trained weights;
refused    it switches on a method that is not known here: accepted while it is off;
unknown    accepted while it is null, false or empty, and then named in a note; refused with any other value.

The last rule lets a config of a newer PEFT pass. PEFT writes every field of its config class, so each new release
brings new keys into every folder. A new option is off by default there, and a folder in which it is off is the folder
that the older release would have written. A number is no such value: 0 may be a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapter_merge.errors import Problem


@dataclass(frozen=True)
class KnownSettings:
    """The keys of one kind of config."""

    read: frozenset[str]
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)  # key -> what it switches on

    def check(self, config: Mapping[str, Any], where: str, *, strict: bool = False) -> tuple[list[Problem], list[str]]:
        """Problems of the settings in `config`, and the unknown ones that are off; `where` names the file.

        strict: an unknown key is a problem whatever its value (our own formats, which nobody else extends).
        """
        problems, off = [], []
        for key, value in config.items():
            got = f"{key} = {value!r:.200}"
            if key in self.refused:
                if value:
                    problems.append(
                        Problem(f"{where}: {self.refused[key]} is not supported", f"{key} switched off", got)
                    )
            elif key in self.read or key in self.ignored:
                continue
            elif not strict and is_off(value):
                off.append(key)
            else:
                problems.append(
                    Problem(
                        f"{where}: the setting {key!r:.100} is not known here",
                        "a setting that is known" if strict else "a setting that is known, or null or false",
                        got,
                        "it may change what the adapter computes: remove it from the file if you know that it does not",
                    )
                )
        return problems, off


def is_off(value: object) -> bool:
    """True for null, false, and an empty text, list or map: what an option that is not used is written as."""
    return value is None or value is False or value in ("", [], {})


def note_of(off: list[str], where: str) -> tuple[str, ...]:
    """What is said of unknown settings that are off."""
    if not off:
        return ()
    return (f"{where}: settings that are not known here, all null, false or empty: {', '.join(sorted(off))}",)
