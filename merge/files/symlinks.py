"""Symbolic links in a folder: a link that leads out of it is only followed to a blob of the hub's cache."""

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
    """Return True where `path` leads through a link out of `folder`, and not to a blob of the hub's cache."""
    return not path.resolve().is_relative_to(folder.resolve()) and not is_hub_blob(folder, path)
