"""The key of vLLM's cache of compiled graphs, extended by the plugin's code.

vLLM stores compiled graphs on disk under a hash of environment, configuration and version, which does not depend on the
plugin. With the plugin, a graph that a stock vLLM compiled would be loaded, and row scales would be skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wrap_compute_hash(original: Callable[[Any], str]) -> Callable[[Any], str]:
    """Wrap LoRAConfig.compute_hash (`original`), which is part of the key when LoRA is on: add the code's hash."""
    mark = code_hash()

    def compute_hash(self: Any) -> str:
        return hashlib.sha256(f"{original(self)} adapter-merge {mark}".encode()).hexdigest()

    return compute_hash


def code_hash() -> str:
    """Return the sha256 of the code that becomes part of vLLM's graphs."""
    return hashlib.sha256(Path(__file__).with_name("row_scale.py").read_bytes()).hexdigest()
