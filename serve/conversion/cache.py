"""The cache of served folders: one folder per adapter, base and version, named by a hash of all three.

A served folder is a factor folder (adapter_config.json, adapter_model.safetensors and, for DoRA and DuDe,
row_scale.safetensors). Its name is the sha256 of everything that it was made from, so that another adapter, base or
version of this package gets another folder. This is necessary because vLLM keys its prefix cache by name and path:
under an old path it would reuse blocks that the previous weights computed.

Each entry has a lock file beside the folders. A process that writes or removes the entry holds an exclusive lock. A
server holds a shared lock as long as it may read the folder, so that eviction skips entries in use. The kernel releases
the lock of a process that ends in any way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from adapter_merge.errors import OutputError
from adapter_merge.files.cache_folder import cache_folder
from adapter_merge.files.hashing import file_sha256
from adapter_merge.files.locks import lock_file
from adapter_merge.outputs.staging import sync_folder

LAYOUT = 3  # version of the served folders' layout; a part of every key
ENTRY = "entry.json"
DEFAULT_BYTES = 50 * 10**9


@dataclass(frozen=True)
class Entry:
    """One served folder in the cache."""

    key: str
    folder: Path
    nbytes: int
    used: float  # time of the last use, seconds since 1970
    in_use: bool
    adapter: str  # path of the adapter that was converted
    base: str


class Lease:
    """A shared lock on one entry, which is not evicted before `release` or the end of the process.

    A lease without references is released by the garbage collector, for example after a client has disconnected.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self.release = weakref.finalize(self, os.close, descriptor)  # a second call does nothing

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def compute_key(parts: dict[str, Any]) -> str:
    """Return the sha256 over the canonical JSON of everything that an entry depends on."""
    text = json.dumps({"layout": LAYOUT, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Served folders under one root, with a total size of at most `max_bytes`, entries in use not counted."""

    def __init__(self, root: Path | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        self.root = (root or cache_folder()).absolute()
        self.max_bytes = max_bytes
        # Entries whose hashes were checked: key -> (name, inode, size, mtime) of each file at that time.
        self._checked: dict[str, tuple[tuple[str, int, int, int], ...]] = {}

    def obtain(self, key: str, make: Callable[[Path], dict[str, Any]]) -> Lease:
        """Return a lease on the entry `key`; where the entry is missing, `make` writes it first.

        `make` gets the path of a folder to create and returns the content of `entry.json`. Where several processes ask
        for one entry, one writes it and the others wait. An exception of `make` is raised and leaves no files. Raises
        OutputError where the cache cannot be written.
        """
        folder = self.root / key
        while (lease := self.lease(folder)) is None:
            fd = self._lock_exclusively(key, folder)
            try:
                if not self._is_undamaged(folder):
                    self._make(key, folder, make)
                os.utime(self._lock_file(key))
            finally:
                os.close(fd)
        try:
            self.evict()
        except BaseException:
            lease.release()
            raise
        return lease

    def lease(self, folder: Path) -> Lease | None:
        """Return a lease on `folder` where it is an undamaged entry of this cache, else None."""
        if folder.parent.resolve() != self.root.resolve() or not folder.is_dir():
            return None
        lease = Lease(folder, self._lock(folder.name, fcntl.LOCK_SH))
        if not self._is_undamaged(folder):
            lease.release()
            return None
        os.utime(self._lock_file(folder.name))
        return lease

    def entries(self) -> list[Entry]:
        """Return every entry, the least recently used first."""
        entries = []
        for folder in self.root.glob("?" * 64) if self.root.is_dir() else ():
            try:
                about = json.loads((folder / ENTRY).read_text("utf-8"))
                nbytes = sum(file.stat().st_size for file in folder.iterdir())
            except (OSError, ValueError):
                continue
            lock = self._lock_file(folder.name)
            used = lock.stat().st_mtime if lock.exists() else folder.stat().st_mtime
            entries.append(
                Entry(
                    key=folder.name,
                    folder=folder,
                    nbytes=nbytes,
                    used=used,
                    in_use=not self._try_remove(folder.name, remove=False),
                    adapter=str(about.get("adapter", "")),
                    base=str(about.get("base", "")),
                )
            )
        return sorted(entries, key=lambda entry: entry.used)

    def evict(self) -> list[Entry]:
        """Remove the least recently used entries until the others fit into max_bytes; entries in use stay."""
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        removed = []
        for entry in entries:
            if total <= self.max_bytes:
                break
            if self._try_remove(entry.key):
                total -= entry.nbytes
                removed.append(entry)
        return removed

    def clear(self) -> tuple[list[Entry], list[Entry]]:
        """Remove every entry that is not in use, and files of killed runs; return (removed, still in use)."""
        removed: list[Entry] = []
        in_use: list[Entry] = []
        for entry in self.entries():
            (removed if self._try_remove(entry.key) else in_use).append(entry)
        if self.root.is_dir():
            for partial in self.root.glob(".partial-*"):
                self._try_remove(partial.name.removeprefix(".partial-")[:64])
        return removed, in_use

    def verify(self) -> list[tuple[Entry, list[str]]]:
        """Read every entry; return the damaged ones with their problems. Changes nothing."""
        checked = [(entry, find_damage(entry.folder)) for entry in self.entries()]
        return [(entry, problems) for entry, problems in checked if problems]

    def _make(self, key: str, folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
        """Write the entry in a staging folder and rename it; the caller holds the exclusive lock."""
        partial = self.root / f".partial-{key}"
        for old in (partial, folder):
            if old.exists():
                shutil.rmtree(old)
        try:
            partial.mkdir()
            staged = partial / "folder"
            about = make(staged)
            hashes = {file.name: file_sha256(file) for file in sorted(staged.iterdir())}
            (staged / ENTRY).write_text(
                json.dumps({**about, "files": hashes, "made": int(time.time())}, indent=2) + "\n", "utf-8"
            )
            _sync_files(staged)
            staged.rename(folder)
            sync_folder(self.root)
        except OSError as error:
            raise OutputError(
                f"{self.root}: the cache cannot be written ({error.strerror or error})",
                hint="ADAPTER_MERGE_CACHE chooses another folder; adapter-merge cache clear frees space",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _is_undamaged(self, folder: Path) -> bool:
        """Return True when every file has its recorded hash; files are read again only after they have changed."""
        try:
            state = _list_file_states(folder)
            if self._checked.get(folder.name) != state:
                if find_damage(folder):
                    return False
                self._checked[folder.name] = state
            return True
        except OSError:
            return False

    def _lock_file(self, key: str) -> Path:
        return self.root / f"{key}.lock"

    def _lock(self, key: str, mode: int) -> int:
        """Return a descriptor that holds the lock of `key`; with LOCK_NB in `mode`, raise BlockingIOError, not wait."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return lock_file(self._lock_file(key), mode)
        except BlockingIOError:
            raise
        except OSError as error:
            raise OutputError(
                f"{self.root}: the cache cannot be used ({error.strerror or error})",
                hint="ADAPTER_MERGE_CACHE chooses another folder",
            ) from error

    def _lock_exclusively(self, key: str, folder: Path) -> int:
        """Return the exclusive lock of `key`. Waits for a writer of the entry, not for readers of a damaged entry."""
        for _ in range(100):
            if not folder.is_dir():
                return self._lock(key, fcntl.LOCK_EX)
            with suppress(BlockingIOError):
                return self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.1)
        raise OutputError(
            f"{folder}: this cache entry is damaged, and another server is using it",
            hint="stop that server, or choose another cache with ADAPTER_MERGE_CACHE",
        )

    def _try_remove(self, key: str, remove: bool = True) -> bool:
        """Remove an entry with its lock file; return False where another process holds its lock."""
        try:
            fd = self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            if remove:
                trash = self.root / f".partial-{key}"
                shutil.rmtree(trash, ignore_errors=True)
                if (self.root / key).exists():
                    (self.root / key).rename(trash)
                shutil.rmtree(trash, ignore_errors=True)
                self._lock_file(key).unlink(missing_ok=True)
            return True
        finally:
            os.close(fd)


def find_damage(folder: Path) -> list[str]:
    """Return the problems of one entry's files by their sha256 in entry.json; [] where there are none."""
    try:
        stated = json.loads((folder / ENTRY).read_text("utf-8"))["files"]
        hashes = {str(name): str(sha) for name, sha in stated.items()}
        present = {file.name for file in folder.iterdir()} - {ENTRY}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"{ENTRY} cannot be read ({type(error).__name__})"]
    problems = [f"{name} does not belong to the entry" for name in sorted(present - hashes.keys())]
    for name, sha in hashes.items():
        if name not in present:
            problems.append(f"{name} is missing")
        elif (computed := file_sha256(folder / name)) != sha:
            problems.append(f"{name}: expected sha256 {sha[:16]}, got {computed[:16]}")
    return problems


def _list_file_states(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return (name, inode, size, mtime) of every file in `folder`."""
    found = []
    for file in os.scandir(folder):
        about = file.stat()
        found.append((file.name, about.st_ino, about.st_size, about.st_mtime_ns))
    return tuple(sorted(found))


def _sync_files(folder: Path) -> None:
    """Flush the files in `folder`, and the folder itself, to the disk."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_folder(folder)
