"""sha256 of an adapter: over the names and hashes of its files, as manifests state it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from adapter_merge.methods.adapter import Adapter
from adapter_merge.storage.hashing import hash_files


def adapter_sha256(adapter: Adapter) -> str:
    """Return the sha256 over the adapter's files, in the order of their names."""
    return combined_sha256(adapter_files(adapter))


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
