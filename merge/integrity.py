"""The proof that an output is what was written: every file hashed again and held against the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import FileFormatError, InputError, Problem, raise_all
from .hashing import hash_files
from .output import MANIFEST, read_manifest


@dataclass(frozen=True)
class Integrity:
    """What was proved."""

    folder: Path
    files: int
    nbytes: int
    inputs: int  # files of base and adapters that are still where the manifest says, and still the same
    moved: tuple[str, ...]  # inputs that are no longer there: nothing is known of them


def check_integrity(
    folder: str | Path,
    *,
    inputs: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Integrity:
    """Prove the hashes of `folder`'s manifest; `inputs` proves those of base and adapters too, where they still are.

    progress: called with the bytes of each file. Raises InputError when there is no manifest with hashes, and
    FileFormatError naming every file that is missing, changed, or not in the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None or not manifest.get("files"):
        raise InputError(
            f"{folder}: nothing to prove",
            expected=f"a folder with an {MANIFEST} that holds hashes",
            got="no manifest" if manifest is None else "a manifest without hashes",
            hint="was it written with --no-hashes, or copied without its manifest?",
        )
    expected: dict[str, str] = manifest["files"]
    problems = [Problem(f"{folder}: {name} is missing") for name in expected if not (folder / name).is_file()]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    hidden = {name for name in present if any(part.startswith(".") for part in Path(name).parts)}
    for name in sorted(present - set(expected) - {MANIFEST} - hidden):
        problems.append(Problem(f"{folder}: {name} is not in the manifest", hint="it was added after the merge"))
    claims = {folder / name: sha for name, sha in expected.items() if name in present}
    found = hash_files(claims, workers, progress)
    problems += _differences(claims, found)

    checked: dict[Path, str] = {}
    moved: list[str] = []
    if inputs:
        for source in (manifest.get("base", {}), *manifest.get("adapters", ())):
            for name, sha in source.get("files", {}).items():
                file = Path(source["path"]) / name
                if file.is_file():
                    checked[file] = sha
                else:
                    moved.append(str(file))
        problems += _differences(checked, hash_files(checked, workers, progress))
    raise_all(problems, FileFormatError)
    return Integrity(folder, len(claims), sum(path.stat().st_size for path in claims), len(checked), tuple(moved))


def _differences(claims: dict[Path, str], found: dict[Path, str]) -> list[Problem]:
    return [
        Problem(f"{path}: is not what was recorded", expected=f"sha256 {sha}", got=f"sha256 {found[path]}")
        for path, sha in claims.items()
        if found[path] != sha
    ]
