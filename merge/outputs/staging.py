"""Outputs that are either whole or not there: built in a staging folder, synced, renamed last."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterMergeError, OutputError
from adapter_merge.storage.hashing import file_sha256
from adapter_merge.storage.input_errors import reading, require_utf8
from adapter_merge.storage.input_snapshot import InputSnapshot
from adapter_merge.storage.locks import locked

from .seal import sealed

MANIFEST = "adapter_merge.json"
SPLIT = "split"  # in a staging folder: parts of a split merge are being made here
AT_FDCWD = -100
COPY_BYTES = 1 << 20
RENAME_EXCHANGE = 2  # linux/fs.h


def check_output(output: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise OutputError when `output` may not be written: it exists, is or holds an input, or lies in a model's folder.

    A folder inside a model would be taken for one of its side files by whatever copies the model next.
    """
    from adapter_merge.storage.checkpoint import CANDIDATES

    require_utf8(output, OutputError)
    resolved = output.resolve()
    for source in inputs:
        if source.resolve() in resolved.parents and any((source / name).is_file() for name in CANDIDATES):
            raise OutputError(f"{output}: is inside the model {source}", hint="choose an --output beside it")
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(f"{output}: is, or contains, the input {source}", hint="choose another --output")
    if output.exists() or output.is_symlink():
        if not overwrite:
            raise OutputError(f"{output}: exists already", hint="choose another --output, or pass --overwrite")
        if not output.is_dir():
            raise OutputError(f"{output}: is a file, so it is not replaced", hint="choose another --output")
        if any(output.iterdir()) and not (output / MANIFEST).is_file():
            raise OutputError(
                f"{output}: exists and was not written by adapter-merge, so it is not replaced",
                expected=f"a folder that holds {MANIFEST}",
                hint="choose another --output, or remove the folder yourself",
            )


def check_space(output: Path, nbytes: int) -> None:
    """Raise OutputError when the disk of `output` has less than `nbytes` free."""
    free = shutil.disk_usage(nearest_folder(output)).free
    if nbytes > free:
        raise OutputError(
            f"{output}: the disk is too small",
            expected=f"{nbytes / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB free",
            hint="free some space, or choose another --output",
        )


def nearest_folder(output: Path) -> Path:
    """The closest folder above `output` that exists: on the file system that the output will be on."""
    folder = output.parent.resolve()  # of the name: a link is replaced, not what it points to
    while not folder.exists():
        folder = folder.parent
    return folder


def staging_folder(output: Path) -> Path:
    """Where `output` is built: beside it, hidden, of the same name for every run, so that a rerun finds it."""
    return output.parent / f".{output.name}.partial"


def wipe(staging: Path) -> None:
    """Remove what an earlier run has left. Raises OutputError for a split merge's parts: other machines made them."""
    if (staging / SPLIT).exists():
        raise OutputError(
            f"{staging}: holds parts of another merge",
            expected="the same base, adapter and options as those parts",
            hint="finish that merge first, or remove the folder yourself",
        )
    remove(staging)


def recover(output: Path) -> None:
    """Give an output its name back when a run was killed while it replaced it in two steps (see `publish`)."""
    old = _aside(output)
    if old.is_symlink() or old.exists():
        if output.exists() or output.is_symlink():
            remove(old)
        else:
            old.rename(output)


def _aside(output: Path) -> Path:
    return output.parent / f".{output.name}.old"


@contextmanager
def staged(output: Path, overwrite: bool = False, inputs: InputSnapshot | None = None) -> Iterator[Path]:
    """A folder to build `output` in; it takes the output's name when the block ends well, else it is removed.

    What was there before stays until the new one is whole, and what a killed run left in the staging folder is
    removed first. inputs: the files that the output is made from, looked at again before the output takes its name.
    Raises FileFormatError when one of them has changed, and OutputError when the output exists, another run writes
    it, or the disk refuses (full).
    """
    check_output(output, overwrite)
    with locked(output), disk_errors(output):
        recover(output)
        check_output(output, overwrite)  # another run may just have ended
        staging = staging_folder(output)
        wipe(staging)
        try:
            staging.mkdir()
            yield staging
            if inputs is not None:
                inputs.check()
            publish(staging, output, overwrite)
        finally:
            remove(staging)


@contextmanager
def disk_errors(output: Path, left: str = "nothing was left behind") -> Iterator[None]:
    """OSErrors while writing `output` become OutputErrors; `left` says what a rerun will find."""
    try:
        yield
    except OSError as error:
        got = str(error.filename) if error.filename is not None else None  # it may be an input that cannot be read
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})", got=got, hint=left) from error


def publish(folder: Path, output: Path, overwrite: bool) -> None:
    """Give the finished `folder` its name, in one step where the kernel can exchange two names; sync both.

    Where it cannot (some network file systems), what was there steps aside first, and comes back when the second
    step fails; a run that was killed between the two is mended by the next one (`recover`).
    Raises OutputError for what has appeared under that name since the run began.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)
    check_output(output, overwrite)
    if output.exists() or output.is_symlink():
        if _exchange(folder, output):
            sync_folder(output.parent)
            remove(folder)  # what was there before
            return
        old = _aside(output)
        remove(old)
        try:
            output.rename(old)
            folder.rename(output)
        except BaseException:
            recover(output)
            raise
        sync_folder(output.parent)
        remove(old)
        return
    folder.rename(output)
    sync_folder(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (renameat2, Linux). False where the kernel or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that the names in it survive a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file's bytes to a new file and fsync it. Raises FileFormatError where `source` cannot be read."""
    with reading(source):
        stream = source.open("rb")
    with stream, target.open("wb") as copy:
        while True:
            with reading(source):
                piece = stream.read(COPY_BYTES)
            if not piece:
                break
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())


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
    return file_sha256(file)


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


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write and fsync the manifest of `folder`, sealed (seal.py)."""
    write_json(folder / MANIFEST, sealed(content))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, None where there is none. Raises AdapterMergeError when it cannot be read."""
    from adapter_merge.storage.checkpoint import read_json

    file = folder / MANIFEST
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("tool") != "adapter-merge":
        raise AdapterMergeError(f"{file}: not one of ours", expected='"tool": "adapter-merge"')
    return content
