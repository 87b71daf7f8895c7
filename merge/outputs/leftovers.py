"""Recognition and removal of the files that a killed run leaves beside an output.

    .OUT.lock       the lock file, which holds locks.MARK
    .OUT.partial    the staging folder
    .OUT.old        an output that was being replaced in two steps
    .partial-KEY    the staging folder of an entry of the serving cache, with KEY.lock; KEY is a sha256

Nothing is removed while a run holds the lock (the kernel releases the lock of a killed process), or where the files
could be another program's: a staging folder must have this project's lock file beside it, or its manifest or journal
inside, and must not be a link.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter_merge.errors import InputError, OutputError
from adapter_merge.files.input_errors import reading
from adapter_merge.files.locks import is_own_lock, lock_file, lock_name

MANIFEST = "adapter_merge.json"
PREIMAGE_FOLDER = "preimage"  # of a merged model: the base's bytes that the merge changed (preimage.py)
SPLIT = "split"  # a file that marks a staging folder with parts of a split merge
JOURNAL = "journal"  # a folder of a merge's staging folder: the finished files (resume_journal.py)
MODEL = "model"  # a folder of a merge's staging folder: the output so far
HIDDEN = re.compile(r"\.(?P<name>.+)\.(lock|partial|old)")
CACHED = re.compile(r"\.partial-(?P<key>[0-9a-f]{64})")  # a lock file alone could belong to the hub's cache


@dataclass(frozen=True)
class Leftover:
    """One file or folder of a killed run."""

    path: Path
    nbytes: int
    kept: str = ""  # why it was kept; "" where it was removed


def staging_folder(output: Path) -> Path:
    """Return the hidden folder beside `output` that it is built in, the same for every run."""
    return output.parent / f".{output.name}.partial"


def old_name(output: Path) -> Path:
    """Return the temporary name of an output that is replaced in two steps."""
    return output.parent / f".{output.name}.old"


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def wipe(staging: Path) -> None:
    """Remove the staging folder of an earlier run. Raises OutputError where it holds parts of a split merge."""
    if not staging.is_symlink() and _holds_parts(staging):
        raise OutputError(
            f"{staging}: holds parts of another merge",
            expected="the same base, adapter and options as those parts",
            hint="finish that merge first, or remove the folder yourself",
        )
    remove(staging)


def recover(output: Path) -> None:
    """Rename an output back when a run was killed while it replaced it in two steps (see staging.publish)."""
    old = old_name(output)
    if old.is_symlink() or old.exists():
        if output.exists() or output.is_symlink():
            remove(old)
        else:
            old.rename(output)


def clear_after(output: Path) -> list[Leftover]:
    """Remove the leftovers beside a finished `output`, except shards with which the next run can resume."""
    return _clear(output, resumable=False)


def clear_folder(folder: Path) -> list[Leftover]:
    """Remove the leftovers of all killed runs in `folder`, including finished shards; parts of split merges are kept.

    Raises InputError where `folder` does not exist, FileFormatError where it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", expected="the folder that holds outputs, or the serving cache")
    with reading(folder):
        names = sorted(path.name for path in folder.iterdir())
    leftovers: list[Leftover] = []
    for name in sorted({match["name"] for match in map(HIDDEN.fullmatch, names) if match}):
        leftovers += _clear(folder / name, resumable=True)
    for match in map(CACHED.fullmatch, names):
        leftovers += _clear_entry(folder, match["key"]) if match else []
    return leftovers


def _clear(output: Path, *, resumable: bool) -> list[Leftover]:
    """Remove the leftovers beside `output`; `resumable`: also finished shards with which a merge could resume."""
    lock, staging, old = lock_name(output), staging_folder(output), old_name(output)
    # After a power failure the lock file may be empty.
    ours = is_own_lock(lock) or (is_own_lock(lock, b"") and (output / MANIFEST).is_file())
    old_is_ours = _is_folder(old) and (ours or (old / MANIFEST).is_file())
    staging_is_ours = _is_folder(staging) and (ours or _is_own_staging(staging, output))
    if not (ours or old_is_ours or staging_is_ours):
        return []
    try:
        fd = lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a run holds it, or the folder cannot be written
        return []
    leftovers = []
    try:
        if old_is_ours:
            leftovers.append(Leftover(old, _size(old)))
            recover(output)
        if staging_is_ours:
            nbytes, kept = _size(staging), ""
            if _holds_parts(staging):
                kept = "parts of a split merge: merge --finish joins them"
            elif not resumable and any((staging / JOURNAL).glob("*.json")) and (staging / MODEL).is_dir():
                kept = "finished shards, with which the same merge resumes"
            else:
                kept = _try_remove(staging)
            leftovers.append(Leftover(staging, nbytes, kept))
        if ours:
            leftovers.append(Leftover(lock, 0))
    finally:
        if ours or os.fstat(fd).st_size == 0:
            lock.unlink(missing_ok=True)
        os.close(fd)
    return leftovers


def _clear_entry(cache: Path, key: str) -> list[Leftover]:
    """Remove the staging folder of a cache entry, and its lock where the entry itself does not exist."""
    lock, staging = cache / f"{key}.lock", cache / f".partial-{key}"
    if not _is_folder(staging) or not lock.is_file() or lock.is_symlink():
        return []
    try:
        fd = lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return []
    try:
        leftovers = [Leftover(staging, _size(staging), _try_remove(staging))]
        if not (cache / key).exists():
            leftovers.append(Leftover(lock, 0))
            lock.unlink(missing_ok=True)
    finally:
        os.close(fd)
    return leftovers


def _try_remove(path: Path) -> str:
    """Remove `path`; return "", or the reason why it still exists."""
    remove(path)
    return "it could not be removed" if path.exists() else ""


def _holds_parts(staging: Path) -> bool:
    """True where the folder holds parts of a split merge that are not joined yet."""
    return (staging / SPLIT).exists() and (staging / MODEL).is_dir()


def _is_folder(path: Path) -> bool:
    """True for a folder, not a link, that belongs to this user."""
    return path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.geteuid()


def _is_own_staging(staging: Path, output: Path) -> bool:
    """True for a folder with a manifest or journal of this project, and for an empty one beside a finished output."""
    if (staging / MANIFEST).is_file() or (staging / JOURNAL / "plan.json").is_file():
        return True
    files = [path for path in staging.rglob("*") if not path.is_dir() or path.is_symlink()]
    in_journal = all(path.parent == staging / JOURNAL and path.name.endswith(".safetensors.json") for path in files)
    return in_journal and (bool(files) or (output / MANIFEST).is_file())


def _size(folder: Path) -> int:
    """Return the bytes that the folder's files take on the disk."""
    return sum(about.st_blocks * 512 for about in _states(folder))


def _states(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        try:
            about = path.lstat()
        except OSError:
            continue
        yield about
