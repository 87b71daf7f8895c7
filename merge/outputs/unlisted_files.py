"""Comparison of the entries of an output folder with its manifest; unlisted entries and links are problems."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapter_merge.errors import FileFormatError, Problem
from adapter_merge.files.symlinks import is_hub_blob
from adapter_merge.storage.checkpoint import CANDIDATES

from .manifest import MANIFEST

SIGNATURE = "model.sig"
# Files that git and signing add to a folder. No loader reads them, so they are reported and not hashed.
PERMITTED = (SIGNATURE, ".gitattributes")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FolderContent:
    """The entries of a folder: the manifest's files that exist, permitted other files, and the problems."""

    present: frozenset[str]
    beside: tuple[str, ...]
    problems: tuple[Problem, ...]


def stated_hashes(folder: Path, files: object) -> dict[str, str]:
    """Return the sha256 by name of a manifest's `files`. Raises FileFormatError for names outside the folder."""
    hashes: dict[str, str] = {}
    for name, entry in files.items() if isinstance(files, Mapping) else [("files", None)]:
        sha = entry.get("sha256") if isinstance(entry, Mapping) else entry
        path = PurePosixPath(str(name))
        if not isinstance(sha, str) or not SHA256.fullmatch(sha):
            raise FileFormatError(f"{folder / MANIFEST}: {name!r} has no sha256", got=repr(sha)[:80])
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name in (".", MANIFEST):
            raise FileFormatError(f"{folder / MANIFEST}: names {name!r}", expected="files of the folder itself")
        hashes[str(name)] = sha
    return hashes


def list_content(folder: Path, expected: Mapping[str, str]) -> FolderContent:
    """List everything in `folder`, hidden or not, without following links. Raises FileFormatError if unreadable."""
    allowed = {*expected, MANIFEST, *PERMITTED}
    parents = {parent.as_posix() for name in expected for parent in PurePosixPath(name).parents}
    present: set[str] = set()
    problems: list[Problem] = []
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise FileFormatError(f"{current}: cannot be read ({error.strerror or error})") from error
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if entry.is_symlink() and not (name in allowed and is_hub_blob(folder, path)):
                problems.append(
                    Problem(
                        f"{path}: is a symbolic link",
                        got=str(path.readlink()),
                        hint="its target may change at any time",
                    )
                )
                present.discard(name)
            elif entry.is_dir(follow_symlinks=False):
                if name in parents:
                    waiting.append(path)
                else:
                    problems.append(Problem(f"{path}: a folder that is not in the manifest", hint=ADDED))
            elif not entry.is_file():
                problems.append(Problem(f"{path}: is not a regular file"))
            elif name in allowed:
                present.add(name)
            else:
                problems.append(Problem(f"{path}: is not in the manifest", hint=ADDED))
    named = {problem.cause.partition(": ")[0] for problem in problems}
    for name in sorted(expected.keys() - present):
        if str(folder / name) not in named:
            problems.append(Problem(f"{folder / name}: is missing"))
    beside = tuple(sorted(present.intersection(PERMITTED) - expected.keys()))
    return FolderContent(frozenset(present.intersection(expected)), beside, tuple(problems))


ADDED = "it was added after the output was written"


def holds_graph(folder: Path) -> bool:
    """Return True for an ONNX export: a folder with a graph, or with a graph in onnx/ and no checkpoint."""
    if any(folder.glob("*.onnx")):
        return True
    return any(folder.glob("onnx/*.onnx")) and not any((folder / name).is_file() for name in CANDIDATES)
