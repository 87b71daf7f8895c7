"""The manifest of every output, adapter_merge.json: its common keys, its writing, and its checked reading."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterMergeError
from adapter_merge.files.json_types import (
    NAME,
    NUMBER,
    OBJECT,
    PATH,
    TEXT,
    TEXTS,
    Each,
    Kind,
    Schema,
    Stated,
    check_types,
)

from .leftovers import MANIFEST as MANIFEST
from .manifest_seal import sealed
from .staging import write_json


def make_manifest(
    artefact: str, inputs: Mapping[str, Any], options: Mapping[str, Any], **content: Any
) -> dict[str, Any]:
    """Return the common keys of every adapter_merge.json: artefact, inputs, options and versions."""
    import platform
    from datetime import datetime
    from importlib.metadata import version

    return {
        "artefact": artefact,
        "tool": "adapter-merge",
        "versions": {name: version(name) for name in ("adapter-merge", "torch", "safetensors")}
        | {"python": platform.python_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **inputs,
        "options": dict(options),
        **content,
    }


_HASH = Kind("a sha256, or an object with one", lambda value: isinstance(value, str | dict))
_HASHES = Each(TEXT, keys=PATH)
_INPUT: Schema = {"name": NAME, "path": PATH, "fingerprint": TEXT, "layout": TEXT, "files": _HASHES, "notes": TEXTS}
_ADAPTER: Schema = {
    **_INPUT,
    **dict.fromkeys(("format", "base_kind", "evidence", "trained_on", "origin", "sha256", "source"), TEXT),
    "contradictions": TEXTS,
    "replacements": TEXTS,
    "modules": NUMBER,
    "stated": OBJECT,
}
_MANIFEST: Schema = {
    "artefact": Stated(TEXT),
    "created": Stated(TEXT),
    "versions": Stated(Each(TEXT)),
    "options": Stated({"combination": OBJECT}),
    "base": _INPUT,
    "files": Each(_HASH, keys=PATH),
    "warnings": TEXTS,
    "notes": TEXTS,
    "layers": Each(OBJECT),
    "certificate": OBJECT,
}
_LISTED: Schema = {**_ADAPTER, "name": Stated(NAME), "path": Stated(PATH), "method": Stated(NAME)}


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write and fsync the manifest of `folder`, sealed (manifest_seal.py)."""
    write_json(folder / MANIFEST, sealed(content))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of `folder`; None where there is none. Raises AdapterMergeError when it cannot be read.

    The types of its values are checked. `adapters` is an object by name in an ONNX export, and a list in other outputs.
    """
    from adapter_merge.storage.checkpoint import read_json

    file = folder / MANIFEST
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("tool") != "adapter-merge":
        raise AdapterMergeError(f"{file}: was not written by adapter-merge", expected='"tool": "adapter-merge"')
    listed = isinstance(content.get("adapters"), list)
    adapters = Each(_LISTED, listed=True) if listed else Each(_ADAPTER)
    check_types(content, {**_MANIFEST, "adapters": adapters}, file)
    return {key: value for key, value in content.items() if value is not None}
