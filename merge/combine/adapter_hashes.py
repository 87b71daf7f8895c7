"""sha256 of an adapter: over the names and hashes of its files, as manifests state it; and what it was made from.

A manifest's entry of an adapter holds "sha256" (of the adapter), "files" (of each of its files) and "made_from": the
hashes of the adapters that it was converted or factored from. The base's entry holds "merged": the hashes of all
adapters that had been merged into it before. An adapter is therefore found again in any merge that follows, in another
folder or form too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.files.hashing import hash_files
from adapter_merge.files.input_errors import reading
from adapter_merge.methods.adapter import Adapter
from adapter_merge.storage.checkpoint import WEIGHT_SUFFIXES, read_json

MANIFEST = "adapter_merge.json"
MADE = ("adapter", "factors")  # artefacts that are adapters


def adapter_files(adapter: Adapter) -> dict[str, str]:
    """Return the sha256 of each of the adapter's files, by its path in the adapter's folder."""
    return {relative_name(file, adapter.folder): sha for file, sha in hash_files(sorted(adapter.files)).items()}


def combined_sha256(files: Mapping[str, str]) -> str:
    """Return the sha256 over the names and sha256 of `files`, in the order of their names."""
    digest = hashlib.sha256()
    for name, sha in sorted(files.items(), key=lambda item: Path(item[0]).name):
        digest.update(f"{Path(name).name}\0{sha}\0".encode())
    return digest.hexdigest()


def relative_name(file: Path, folder: Path) -> str:
    """Return the file's path relative to `folder`, or its bare name where it is elsewhere."""
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return file.name


def manifest_of(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder that adapter-merge wrote; empty where there is none."""
    file = folder / MANIFEST
    with reading(file):
        return read_json(file) if file.is_file() else {}


def made_from(folder: Path) -> set[str]:
    """Return the hashes of the adapters that the adapter in `folder` was converted or factored from."""
    manifest = manifest_of(folder)
    return _hashes_in(manifest.get("adapters")) if manifest.get("artefact") in MADE else set()


def merged_into(folder: Path) -> set[str]:
    """Return the hashes of all adapters that are merged into the model in `folder`, by the manifests of its merges."""
    manifest = manifest_of(folder)
    if manifest.get("artefact") != "merged model":
        return set()
    base = manifest.get("base")
    return _hashes_in(manifest.get("adapters")) | _texts(base.get("merged") if isinstance(base, dict) else None)


def identities(adapter: Adapter) -> set[str]:
    """Return every hash by which `adapter` may be listed: of it, of its weights, and of what it was made from."""
    files = adapter_files(adapter)
    return {combined_sha256(files), *_weights(files)} | made_from(adapter.folder)


def _hashes_in(entries: object) -> set[str]:
    """Return all hashes in a manifest's entries of adapters."""
    found: set[str] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            files = entry.get("files")
            found |= _texts([entry.get("sha256")]) | _texts(entry.get("made_from"))
            found |= set(_weights(files)) if isinstance(files, dict) else set()
    return found


def _weights(files: Mapping[str, str]) -> Iterable[str]:
    return [sha for name, sha in files.items() if name.endswith(WEIGHT_SUFFIXES) and isinstance(sha, str)]


def _texts(values: object) -> set[str]:
    return {value for value in values if isinstance(value, str)} if isinstance(values, list) else set()
