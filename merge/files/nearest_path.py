"""The path that was probably meant: the closest name in the folder where a path that is not there should be."""

from __future__ import annotations

import difflib
from pathlib import Path


def nearest_path(path: Path) -> Path | None:
    """Return the most similar path beside the one that is missing, None where nothing is similar.

    The first part that is not there is replaced, the rest is kept where the result exists: adpters/german becomes
    adapters/german.
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
        rest = path.relative_to(missing)
        candidate = parent / name / rest
        if candidate.exists():
            return candidate
    return None
