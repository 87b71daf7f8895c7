"""Symbolic links in a folder: those that lead out of it are not followed, but for those of the hub's cache."""

from __future__ import annotations

from pathlib import Path


def is_hub_blob(folder: Path, link: Path) -> bool:
    """Return True for a link of the hub's cache: snapshots/REVISION/.../NAME -> blobs/SHA in the same repository.

    folder: the snapshot, or a folder inside it.
    """
    absolute = folder.absolute()
    for snapshot in (absolute, *absolute.parents):
        if snapshot.parent.name == "snapshots":
            blobs = (snapshot.parent.parent / "blobs").resolve()
            target = link.resolve()
            return target.parent == blobs and target.is_file()
    return False


def leads_outside(folder: Path, path: Path) -> bool:
    """Return True when `path` is, or goes through, a link to what is neither in `folder` nor a blob of the hub."""
    return not path.resolve().is_relative_to(folder.resolve()) and not is_hub_blob(folder, path)
