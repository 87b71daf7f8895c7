"""Snapshots of input files, taken before the files are read and compared before the output is published."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from adapter_merge.errors import FileFormatError, Problem, raise_all

from .input_errors import reading


class InputSnapshot:
    """Device, inode, size and times of input files.

    A program can set back the time of the last write, but not that of the last change (ctime). A file that was changed
    and restored therefore differs, and files need not be hashed again. Not detected: a write through a memory
    map that had written to the same page before the snapshot was taken.
    """

    def __init__(self, files: Iterable[Path] = (), may_be_linked: bool = False) -> None:
        """Take the state of `files` now. Raises FileFormatError for a missing file.

        may_be_linked: a new hard link, which changes only the ctime, does not count as a change of these files: a merge
        with --link hardlink creates such links to its base's shards.
        """
        self._files: dict[Path, tuple[os.stat_result, bool]] = {}
        self._link_times = True
        for file in files:
            self._files.setdefault(file, (_stat(file), may_be_linked))

    def __add__(self, other: InputSnapshot) -> InputSnapshot:
        """Return the files of both snapshots; for a file in both, the first one counts."""
        both = InputSnapshot()
        both._files = other._files | self._files
        return both

    def of(self, files: Iterable[Path]) -> InputSnapshot:
        """Return the snapshot of `files` only; the state of files that it lacks is taken now."""
        selected = InputSnapshot()
        for file in files:
            selected._files[file] = self._files.get(file) or (_stat(file), False)
        return selected

    def without_link_times(self) -> InputSnapshot:
        """Return the snapshot without the ctime of files that may be linked.

        A merge with --link hardlink creates links to such files and removes those of a killed run: the ctime changes,
        while the number of links may stay the same.
        """
        copy = InputSnapshot()
        copy._files, copy._link_times = dict(self._files), False
        return copy

    @property
    def readers(self) -> int:
        """Mode bits that an output of these files may have: 0o700, and those of a class that may read all files."""
        modes = [stat.st_mode for stat, _ in self._files.values()]
        return 0o700 | sum(bits for bits in (0o070, 0o007) if all(mode & bits & 0o444 for mode in modes))

    def check(self) -> None:
        """Raise FileFormatError with every file that has changed."""
        changed = [
            file
            for file, (before, linked) in self._files.items()
            if _differ(before, _stat(file), linked, self._link_times)
        ]
        hint = "run the command again when no other program writes to the inputs"
        raise_all([Problem(f"{file}: changed while it was read", hint=hint) for file in changed], FileFormatError)


def snapshot_folder(path: Path) -> InputSnapshot:
    """Take a snapshot of the readable files in the folder `path`, or in the folder of the file `path`."""
    folder = path if path.is_dir() else path.parent
    files = []
    for file in folder.iterdir():
        with suppress(OSError):
            if file.is_file():
                files.append(file)
    return InputSnapshot(files)


def _stat(file: Path) -> os.stat_result:
    with reading(file):
        return file.stat()


def _differ(before: os.stat_result, after: os.stat_result, may_be_linked: bool, link_times: bool) -> bool:
    def identity(stat: os.stat_result) -> tuple[int, ...]:
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    if identity(before) != identity(after):
        return True
    if before.st_ctime_ns == after.st_ctime_ns:
        return False
    return not (may_be_linked and (not link_times or before.st_nlink != after.st_nlink))
