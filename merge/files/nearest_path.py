"""Suggestion for a path that does not exist: the existing path with the most similar name."""

from __future__ import annotations

import difflib
from pathlib import Path


def nearest_path(path: Path) -> Path | None:
    """Return an existing path that is similar to the missing `path`, or None.

    The first part that does not exist is replaced by the most similar name, and the remaining parts are kept:
    adpters/german becomes adapters/german.
    """
    for missing in (*reversed(path.parents), path):
        if not missing.exists():
            break
    else:
        return None
    parent = missing.parent
    try:
        names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return None
    for name in difflib.get_close_matches(missing.name, names, n=3, cutoff=0.6):
        remainder = path.relative_to(missing)
        candidate = parent / name / remainder
        if candidate.exists():
            return candidate
    return None
