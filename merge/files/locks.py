"""Locks on files (flock): the kernel releases the lock of a killed process; its lock file is reused."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_merge.errors import OutputError

MARK = b"adapter-merge\n"  # content of an output's lock file, by which it is recognised
PATIENCE = 2.0  # seconds that a shared lock waits: the last holder locks exclusively for a moment to remove the file


def lock_file(file: Path, mode: int, patience: float = 0.0) -> int:
    """Open and lock `file`, which is created where it does not exist; closing the descriptor releases the lock.

    mode: fcntl.LOCK_SH or LOCK_EX, with LOCK_NB to raise BlockingIOError when another process still holds the lock
    after `patience` seconds instead of waiting. A symbolic link is not followed (OSError). A holder may remove the
    file; a process that waited for it then locks the new file instead.

    Example:
        fd = lock_file(Path(".out.lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    """
    until = time.monotonic() + patience
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, mode)
            locked_state = os.fstat(fd)
            try:
                named_state = file.stat(follow_symlinks=False)
            except FileNotFoundError:
                named_state = None
            if named_state is not None and (named_state.st_dev, named_state.st_ino) == (
                locked_state.st_dev,
                locked_state.st_ino,
            ):
                return fd
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() >= until:
                raise
            time.sleep(0.01)
            continue
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def lock_name(output: Path) -> Path:
    """Return the lock file of an output folder."""
    return output.parent / f".{output.name}.lock"


def is_own_lock(file: Path, content: bytes = MARK) -> bool:
    """Return True for a regular file, not a link, with the content that `locked` writes into a lock file."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(MARK) + 1, 0) == content
    except OSError:
        return False
    finally:
        os.close(fd)


@contextmanager
def locked(output: Path, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of an output folder inside the `with` block; the parts of a split merge share it.

    Raises OutputError when another process still holds it after `patience` seconds.
    """
    file = lock_name(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fd = lock_file(file, mode | fcntl.LOCK_NB, PATIENCE if shared else patience)
        try:
            if os.fstat(fd).st_size == 0:
                os.pwrite(fd, MARK, 0)
                os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
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
            # Only the last holder may remove the file; others hold it open and would lock a file without a name.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(fd)
