"""Two runs on one output exclude each other: flock on a hidden file beside it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_merge.errors import OutputError

PATIENCE = 2.0  # seconds that a part waits: whoever ends holds the lock alone for a moment, to remove its file


def _lock_file(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


@contextmanager
def locked(output: Path, shared: bool = False) -> Iterator[None]:
    """Hold the lock of `output`; shared by the parts of one split merge, exclusive otherwise.

    Raises OutputError at once when another process holds it. The kernel drops the lock of a killed process; the
    empty file that it leaves is used, and removed, by the next run.
    """
    file = _lock_file(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except BlockingIOError:
        raise OutputError(
            f"{output}: another run is writing it",
            hint="wait for that run, or choose another --output",
        ) from None
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        try:
            # Only who is alone may remove the file; others hold it open and would lock a file without a name.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(fd)


def _take(fd: int, kind: int) -> None:
    """Lock `fd`. Raises BlockingIOError when another process holds it, for a shared lock only if it goes on to."""
    until = time.monotonic() + (PATIENCE if kind == fcntl.LOCK_SH else 0)
    while True:
        try:
            return fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.01)


def _lock(file: Path, kind: int) -> int:
    """A descriptor of `file` that holds the lock, and still is the file of that name."""
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(fd, kind)
            held = os.fstat(fd)
            try:
                named = file.stat()
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last holder removed it between our open and our lock: again
