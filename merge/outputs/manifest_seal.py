"""Seal of a manifest: a sha256 of its content, which shows that the manifest was edited.

It is not a signature: an editor of the manifest can compute the seal again (signature.py checks signatures).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import Problem
from adapter_merge.files.input_errors import reading

SEAL = "seal"


def seal_of(content: Mapping[str, Any]) -> str:
    """Return the sha256 of `content` without its seal, as JSON with sorted keys and no spaces."""
    plain = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with JSON types only (tuples become lists), and its seal as the last key."""
    plain: dict[str, Any] = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return {**plain, SEAL: seal_of(plain)}


def check_seal(file: Path) -> list[Problem]:
    """Return the problem of the manifest's seal; empty where it matches the content."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        repeated.extend(sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else ())
        return dict(items)

    with reading(file):
        text = file.read_text("utf-8")
    content = json.loads(text, object_pairs_hook=pairs)
    if repeated:  # readers differ in which of two equal keys they use
        return [Problem(f"{file}: holds the key {repeated[0]} twice", hint="it was edited after it was written")]
    if SEAL not in content:
        hint = "it was edited, or written by an earlier version: write the output again"
        return [Problem(f"{file}: has no seal", hint=hint)]
    computed = seal_of(content)
    if content[SEAL] != computed:
        hint = "it was edited after it was written"
        return [Problem(f"{file}: differs from what was written", f"seal {content[SEAL]}", f"seal {computed}", hint)]
    return []
