"""Outputs that are either whole or not there: built in a staging folder, synced, renamed last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import Any

from .errors import AdapterMergeError, OutputError

MANIFEST = "adapter_merge.json"


def check_output(output: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise OutputError when `output` may not be written: it exists, or is or holds an input."""
    resolved = output.resolve()
    for source in inputs:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(f"{output}: is, or contains, the input {source}", hint="choose another --output")
    if output.exists() or output.is_symlink():
        if not overwrite:
            raise OutputError(f"{output}: exists already", hint="choose another --output, or pass --overwrite")
        if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
            raise OutputError(
                f"{output}: exists and was not written by adapter-merge, so it is not replaced",
                expected=f"a folder that holds {MANIFEST}",
                hint="choose another --output, or remove the folder yourself",
            )


def check_space(output: Path, nbytes: int) -> None:
    """Raise OutputError when the disk of `output` has less than `nbytes` free."""
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OutputError(
            f"{output}: the disk is too small",
            expected=f"{nbytes / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB free",
            hint="free some space, or choose another --output",
        )


@contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to build `output` in; it takes the output's name when the block ends well, else it is removed.

    OSErrors while writing (a full disk) become OutputErrors. What was there before stays until the new one is whole.
    """
    check_output(output, overwrite)
    staging = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            yield staging
            sync_folder(staging)
            old = output.parent / f".{output.name}.old-{os.getpid()}"
            if output.exists():
                output.rename(old)
            staging.rename(output)
            sync_folder(output.parent)
            if old.is_dir():
                shutil.rmtree(old)
            elif old.exists():
                old.unlink()
        except OSError as error:
            raise OutputError(
                f"{output}: cannot be written ({error.strerror or error})", hint="nothing was left behind"
            ) from error
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that the names in it survive a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(file: Path, text: str) -> None:
    """Write and fsync a new text file."""
    with file.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write and fsync a JSON object, readable by people."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256(file: Path) -> str:
    """The file's sha256, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest(artefact: str, inputs: Mapping[str, Any], options: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """The common head of every adapter_merge.json: what was made, from what, how, by which versions."""
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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, None where there is none. Raises AdapterMergeError when it cannot be read."""
    from .checkpoint import read_json

    file = folder / MANIFEST
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("tool") != "adapter-merge":
        raise AdapterMergeError(f"{file}: not one of ours", expected='"tool": "adapter-merge"')
    return content
