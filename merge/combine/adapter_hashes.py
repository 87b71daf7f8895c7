"""The sha256 of an adapter, over the names and hashes of its files, and of the adapters that it was made from.

A manifest's entry of an adapter holds "sha256" (of the adapter), "files" (of each of its files) and "made_from": the
hashes of the adapters that it was converted or factored from. The base's entry holds "merged": the hashes of all
adapters that had been merged into it before. A later merge can therefore recognise an adapter that is already merged,
even where it was copied, converted or factored in between.
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
ADAPTER_ARTEFACTS = ("adapter", "factors")  # artefacts that are adapters


def hash_adapter_files(adapter: Adapter) -> dict[str, str]:
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


def read_manifest_of(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder that adapter-merge wrote; empty where there is none."""
    file = folder / MANIFEST
    with reading(file):
        return read_json(file) if file.is_file() else {}


def hashes_of_origins(folder: Path) -> set[str]:
    """Return the hashes of the adapters that the adapter in `folder` was converted or factored from."""
    manifest = read_manifest_of(folder)
    return _hashes_in(manifest.get("adapters")) if manifest.get("artefact") in ADAPTER_ARTEFACTS else set()


def hashes_of_merged_adapters(folder: Path) -> set[str]:
    """Return the hashes of all adapters that are merged into the model in `folder`, by the manifests of its merges."""
    manifest = read_manifest_of(folder)
    if manifest.get("artefact") != "merged model":
        return set()
    base = manifest.get("base")
    return _hashes_in(manifest.get("adapters")) | _strings_in(base.get("merged") if isinstance(base, dict) else None)


def list_identities(adapter: Adapter) -> set[str]:
    """Return every hash by which a manifest may list `adapter`: its own, its weights', and those of its origins."""
    files = hash_adapter_files(adapter)
    return {combined_sha256(files), *_weight_hashes(files)} | hashes_of_origins(adapter.folder)


def _hashes_in(entries: object) -> set[str]:
    """Return all hashes in a manifest's entries of adapters."""
    hashes: set[str] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            files = entry.get("files")
            hashes |= _strings_in([entry.get("sha256")]) | _strings_in(entry.get("made_from"))
            hashes |= set(_weight_hashes(files)) if isinstance(files, dict) else set()
    return hashes


def _weight_hashes(files: Mapping[str, str]) -> Iterable[str]:
    """Return the sha256 of the weights files among `files` (path -> sha256)."""
    return [sha for name, sha in files.items() if name.endswith(WEIGHT_SUFFIXES) and isinstance(sha, str)]


def _strings_in(values: object) -> set[str]:
    """Return the strings of a list; an empty set for any other value."""
    return {value for value in values if isinstance(value, str)} if isinstance(values, list) else set()
