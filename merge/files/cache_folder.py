"""The folder that holds what this package keeps between runs: downloads and converted adapters."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $ADAPTER_MERGE_CACHE, else adapter-merge in the user's cache folder."""
    chosen = os.environ.get("ADAPTER_MERGE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter-merge"
