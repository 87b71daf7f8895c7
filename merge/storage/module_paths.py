"""Matching of module paths and tensor names that differ by one leading component.

The body of a model is `model`, `bert` or `transformer` in the class with a head and has no prefix in the class without
one. Checkpoints, transformers and PEFT may therefore name the same module with or without that first component.
"""

from __future__ import annotations

from collections.abc import Iterable


def is_same_module(path: str, name: str) -> bool:
    """Return True when two dotted names are equal, or one is the other with one more leading component.

    Example: "bert.encoder.layer.0" and "encoder.layer.0".
    """
    return path == name or path.partition(".")[2] == name or name.partition(".")[2] == path


def match_module_paths(names: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """Return name -> the path of `paths` that is the same module; names without a match are left out.

    An equal path comes first, then the path without the name's leading component, then the path with one more
    component where only one path ends in that way.
    """
    known = set(paths)
    longer: dict[str, list[str]] = {}
    for path in sorted(known):
        longer.setdefault(path.partition(".")[2], []).append(path)
    matches = {}
    for name in names:
        shorter = name.partition(".")[2]
        candidates = longer.get(name, [])
        if name in known:
            matches[name] = name
        elif shorter in known:
            matches[name] = shorter
        elif len(candidates) == 1:
            matches[name] = candidates[0]
    return matches
