"""The files of one job as they were when it began, to be looked at again before its result is believed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from adapter_merge.errors import FileFormatError, Problem, raise_all

from .input_errors import reading


class InputSnapshot:
    """Device, inode, size and times of input files.

    The time of the last change (ctime) cannot be set back by a program, so that a file that was changed and put back
    is told from one that was left alone. Another hard link changes that time too, and nothing else: it is no change.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {file: _stat(file) for file in files}

    def check(self) -> None:
        """Raise FileFormatError naming every file that is not as it was."""
        changed = [file for file, before in self._files.items() if _differ(before, _stat(file))]
        hint = "run it again, once nothing writes to the inputs"
        raise_all([Problem(f"{file}: changed while it was read", hint=hint) for file in changed], FileFormatError)


def _stat(file: Path) -> os.stat_result:
    with reading(file):
        return file.stat()


def _differ(before: os.stat_result, after: os.stat_result) -> bool:
    def identity(stat: os.stat_result) -> tuple[int, ...]:
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    if identity(before) != identity(after):
        return True
    return before.st_ctime_ns != after.st_ctime_ns and before.st_nlink == after.st_nlink
