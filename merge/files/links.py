"""Reflinks (shared extents, copied on write) and hard links, instead of copies of files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from adapter_merge.errors import OutputError

LINKS = ("auto", "reflink", "hardlink", "copy")
FICLONE = 0x40049409  # linux/fs.h


def link_file(source: Path, target: Path, link: str) -> bool:
    """Create `target` as a link of `source`; return False where the caller must copy the file.

    link: "auto" (a reflink where possible), "reflink", "hardlink" or "copy". A hard link is the same file under two
    names, so a change of one changes the other. Raises OutputError where a stated reflink or hard link is impossible.
    """
    if link == "copy":
        return False
    source = source.resolve()
    try:
        if link == "hardlink":
            os.link(source, target)
        else:
            _reflink(source, target)
    except OSError as error:
        if link == "auto":
            return False
        raise OutputError(
            f"{target.name}: cannot be created as a {link} of {source} ({error.strerror or error})",
            hint="base and output must be on one file system"
            + (" that has reflinks (btrfs, XFS): --link auto copies otherwise" if link == "reflink" else ""),
        ) from error
    return True


def can_link(source: Path, folder: Path, link: str) -> bool:
    """Return True where a file in `folder` can be a link of `source`; a temporary file tests it."""
    source = source.resolve()
    if link == "copy" or source.stat().st_dev != folder.stat().st_dev:
        return False
    if link == "hardlink":
        return True
    try:
        with source.open("rb") as stream:
            fd = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
            try:
                fcntl.ioctl(fd, FICLONE, stream.fileno())
            finally:
                os.close(fd)
    except OSError:
        return False
    return True


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as stream:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.ioctl(fd, FICLONE, stream.fileno())
            os.fsync(fd)
        except BaseException:
            target.unlink()
            raise
        finally:
            os.close(fd)
