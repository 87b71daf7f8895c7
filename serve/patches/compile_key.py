"""The key of vLLM's cache of compiled graphs, extended by the plugin's code.

vLLM keeps compiled graphs on disk, by a hash of environment, configuration and version. None of these tells whether the
plugin was there: a graph that a stock vLLM compiled would be loaded with the plugin, and the row scales be skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wrap_compute_hash(original: Callable[[Any], str]) -> Callable[[Any], str]:
    """`original` is LoRAConfig.compute_hash, a part of the key wherever LoRA is on."""
    mark = code_hash()

    def compute_hash(self: Any) -> str:
        return hashlib.sha256(f"{original(self)} adapter-merge {mark}".encode()).hexdigest()

    return compute_hash


def code_hash() -> str:
    """sha256 of the code that becomes a part of vLLM's graphs."""
    return hashlib.sha256(Path(__file__).with_name("row_scale.py").read_bytes()).hexdigest()
