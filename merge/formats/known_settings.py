"""Allow lists of the settings in an adapter's config: an unknown setting may change the weights, so it is refused.

Every key of a config has one of four kinds:

read       the reader uses its value;
ignored    it describes how the adapter was trained or is loaded, and has no effect on the trained weights;
refused    it switches on an unsupported method; accepted only while it is off;
unknown    accepted while it is null, false or empty, and then named in a note; refused with any other value.

The last rule accepts configs of newer PEFT releases. PEFT writes every field of its config class, so each release adds
keys to every folder. A new option is off by default, and a folder in which it is off equals the folder of the older
release. A number never counts as off: 0 may be a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapter_merge.errors import Problem


@dataclass(frozen=True)
class KnownSettings:
    """The known keys of one kind of config."""

    read: frozenset[str]
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)  # key -> what it switches on

    def check(self, config: Mapping[str, Any], file: str, *, strict: bool = False) -> tuple[list[Problem], list[str]]:
        """Return the problems of the settings in `config`, and the unknown keys that are off.

        file: the config's path, for the messages.
        strict: an unknown key is a problem whatever its value (for adapter-merge's own formats).
        """
        problems, off = [], []
        for key, value in config.items():
            setting = f"{key} = {value!r:.200}"
            if key in self.refused:
                if value:
                    problems.append(
                        Problem(f"{file}: {self.refused[key]} is not supported", f"{key} switched off", setting)
                    )
            elif key in self.read or key in self.ignored:
                continue
            elif not strict and is_off(value):
                off.append(key)
            else:
                problems.append(
                    Problem(
                        f"{file}: the setting {key!r:.100} is unknown",
                        "a known setting" if strict else "a known setting, or null or false",
                        setting,
                        "it may change what the adapter computes: remove it from the file if you know that it does not",
                    )
                )
        return problems, off


def is_off(value: object) -> bool:
    """Return True for null, false, and an empty text, list or map, the values of an option that is not used."""
    return value is None or value is False or value in ("", [], {})


def describe_off_settings(off: list[str], file: str) -> tuple[str, ...]:
    """Return a note on unknown settings that are off; () where there are none."""
    if not off:
        return ()
    return (f"{file}: unknown settings, all null, false or empty: {', '.join(sorted(off))}",)
