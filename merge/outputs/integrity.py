"""The proof that an output is what was written: every file hashed again and held against the manifest.

And what follows from a manifest: which inputs it names, and whether a folder is the base of a merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import PATH_KEYS, Ingredient, Recipe, given_options, make_recipe
from adapter_merge.errors import FileFormatError, InputError, Problem, raise_all
from adapter_merge.formats.detection import ReadOptions
from adapter_merge.storage.checkpoint import open_checkpoint
from adapter_merge.storage.hashing import hash_files

from .staging import MANIFEST, read_manifest


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


def is_merged(folder: str | Path) -> bool:
    """True for a merged model with the hashes of its base in its manifest."""
    path = Path(folder)
    manifest = read_manifest(path) if path.is_dir() else None
    return manifest is not None and manifest.get("artefact") == "merged model" and bool(_base_files(manifest))


def check_restored(merged: str | Path, restored: str | Path) -> int:
    """Prove that `restored` is the base of `merged`: how many files. Raises FileFormatError naming every other one."""
    merged, restored = Path(merged), Path(restored)
    expected = _base_files(read_manifest(merged) or {})
    problems = [Problem(f"{restored}: {name} is missing") for name in expected if not (restored / name).is_file()]
    present = {path.relative_to(restored).as_posix() for path in restored.rglob("*") if path.is_file()}
    weights = {name for name in present - set(expected) if name.endswith((".safetensors", ".bin", ".index.json"))}
    problems += [Problem(f"{restored}: {name} is not one of the base's weights") for name in sorted(weights)]
    claims = {restored / name: sha for name, sha in expected.items() if name in present}
    problems += _differences(claims, hash_files(claims))
    raise_all(problems, FileFormatError)
    return len(claims)


def _base_files(manifest: dict[str, Any]) -> dict[str, str]:
    files: dict[str, str] = (manifest.get("base") or {}).get("files") or {}
    return files


def inputs_of(folder: str | Path) -> tuple[str | None, str | Recipe, str | None, ReadOptions | None]:
    """Base, adapter or recipe, base_kind and options that `folder` was made from, all proved to be the same still.

    Raises InputError where the manifest does not lead to them, FileFormatError where they have changed.
    """
    folder = Path(folder)
    found = check_integrity(folder, inputs=True)
    manifest = read_manifest(folder) or {}
    base, adapters = manifest.get("base") or {}, manifest.get("adapters") or []
    problems = [Problem(f"{name}: is not there any more") for name in found.moved]
    if not adapters or not base.get("path") or any("stated" not in entry for entry in adapters):
        problems.append(Problem(f"{folder / MANIFEST}: does not say what it was made from", hint="give BASE ADAPTER"))
    raise_all(problems, InputError)
    if base.get("fingerprint") != open_checkpoint(base["path"]).fingerprint and not _holds_base(base, adapters):
        raise InputError(f"{base['path']}: is not the base that {folder} was made from any more")
    combination = (manifest.get("options") or {}).get("combination")
    if combination is None:
        entry = adapters[0]
        where = None if _holds_base(base, adapters) else base["path"]
        return where, entry["path"], entry["base_kind"], _read_options(entry["stated"])
    densities = combination["densities"]
    ingredients = [
        Ingredient(
            entry["name"],
            entry["path"],
            combination["weights"][entry["name"]],
            densities.get(entry["name"]),
            entry["base_kind"],
            given_options(_read_options(entry["stated"])),
        )
        for entry in adapters
    ]
    settings = Settings(*(combination[key] for key in ("method", "density", "gamma", "seed")))
    return base["path"], make_recipe(ingredients, settings), None, None


def _holds_base(base: dict[str, Any], adapters: list[dict[str, Any]]) -> bool:
    """True for a checkpoint that is base and adapter at once."""
    return any(entry["path"] == base["path"] for entry in adapters)


def _read_options(stated: dict[str, Any]) -> ReadOptions:
    values: dict[str, Any] = {
        key: Path(value) if key in PATH_KEYS else value for key, value in stated.items() if not key.endswith("_sha256")
    }
    return ReadOptions(**values)
