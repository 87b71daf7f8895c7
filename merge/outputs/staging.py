"""Atomic outputs: a folder is built under a hidden name, synced to the disk, and then renamed."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapter_merge.errors import OutputError
from adapter_merge.files.input_errors import reading, require_utf8
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.files.locks import locked

from .leftovers import MANIFEST, clear_after, old_name, recover, remove, staging_folder, wipe

log = logging.getLogger(__name__)

AT_FDCWD = -100
COPY_BYTES = 1 << 20
RENAME_EXCHANGE = 2  # linux/fs.h


def check_output(output: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise OutputError where `output` must not be written: it exists, is or contains an input, or is inside a model.

    A folder inside a model would be copied as one of the model's side files. Leftovers of a killed run beside a
    finished output are removed.
    """
    from adapter_merge.storage.checkpoint import CANDIDATES

    require_utf8(output, OutputError)
    resolved = output.resolve()
    for source in inputs:
        if source.resolve() in resolved.parents and any((source / name).is_file() for name in CANDIDATES):
            raise OutputError(f"{output}: is inside the model {source}", hint="choose an --output outside it")
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(f"{output}: is, or contains, the input {source}", hint="choose another --output")
    _check_writable(output)
    if output.exists() or output.is_symlink():
        if not overwrite:
            clear_after(output)
            raise OutputError(f"{output}: exists already", hint="choose another --output, or pass --overwrite")
        if not output.is_dir():
            raise OutputError(f"{output}: is a file, so it is not replaced", hint="choose another --output")
        if any(output.iterdir()) and not (output / MANIFEST).is_file():
            raise OutputError(
                f"{output}: exists and was not written by adapter-merge, so it is not replaced",
                expected=f"a folder that holds {MANIFEST}",
                hint="choose another --output, or remove the folder yourself",
            )


def _check_writable(output: Path) -> None:
    """Raise OutputError where the user may not create `output`; nothing is written for this check."""
    folder = nearest_folder(output)
    if not folder.is_dir():
        raise OutputError(f"{output}: {folder} is not a folder", hint="choose another --output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"{output}: cannot be written, {folder} is not writable",
            hint="choose another --output, or change the folder's permissions",
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
    """Return the closest existing folder above `output`, which is on the output's file system."""
    folder = output.parent.resolve()  # the parent of the name: a link is replaced, not its target
    while not folder.exists():
        folder = folder.parent
    return folder


@contextmanager
def staged(output: Path, overwrite: bool = False, inputs: InputSnapshot | None = None) -> Iterator[Path]:
    """Yield a folder to build `output` in; at the end it is renamed to `output`, after an error it is removed.

    An existing output stays until the new one is complete; the staging folder of a killed run is removed first.
    inputs: the snapshot of the input files, compared before the rename; the output's permissions are at most theirs.
    Raises FileFormatError when an input has changed, OutputError when the output exists, another run writes it, or the
    disk fails (full).
    """
    check_output(output, overwrite)
    readers = inputs.readers if inputs is not None else 0o777
    with locked(output), disk_errors(output):
        recover(output)
        check_output(output, overwrite)  # another run may have ended while this one waited
        staging = staging_folder(output)
        wipe(staging)
        try:
            staging.mkdir()
            mode = close_to_others(staging, readers)
            yield staging
            if inputs is not None:
                inputs.check()
            open_to_readers(staging, readers, mode)
            publish(staging, output, overwrite)
        finally:
            remove(staging)


@contextmanager
def disk_errors(output: Path, left: str = "nothing was left behind") -> Iterator[None]:
    """Turn an OSError in the block into an OutputError of `output`, with the hint `left` on what was left behind."""
    try:
        yield
    except OSError as error:
        got = str(error.filename) if error.filename is not None else None  # possibly an input that cannot be read
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})", got=got, hint=left) from error


def close_to_others(folder: Path, readers: int) -> int:
    """Remove the mode bits that `readers` lacks from `folder` while it is built; return its mode before."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & ~readers:  # some file systems have no modes to change
        folder.chmod(mode & readers)
    return mode


def open_to_readers(folder: Path, readers: int, mode: int) -> None:
    """Remove the mode bits that `readers` lacks from all files but hard links, and set the folder's `mode`."""
    for path in folder.rglob("*"):
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and about.st_mode & 0o777 & ~readers:
            path.chmod(stat.S_IMODE(about.st_mode) & readers)
    if stat.S_IMODE(folder.stat().st_mode) != mode:
        folder.chmod(mode)


def publish(folder: Path, output: Path, overwrite: bool) -> None:
    """Sync the finished `folder` and rename it to `output`, atomically where the kernel can exchange two names.

    Elsewhere (some network file systems) an existing output is renamed first, and renamed back when the second step
    fails; after a kill between the two steps the next run renames it back (`recover`).
    Raises OutputError where the output was created since the run began.
    """
    log.info("%s: all files written, renaming", output)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)
    check_output(output, overwrite)
    if output.exists() or output.is_symlink():
        if _exchange(folder, output):
            sync_folder(output.parent)
            remove(folder)  # now the previous output
            return
        old = old_name(output)
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


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (renameat2, Linux); return False where the kernel or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


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
        readers = InputSnapshot([source]).readers
    with stream, target.open("wb") as copy:
        mode = stat.S_IMODE(os.fstat(copy.fileno()).st_mode)
        if mode & ~readers:
            os.fchmod(copy.fileno(), mode & readers)
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
    """Write and fsync an indented JSON object."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
