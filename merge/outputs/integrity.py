"""Check of an output folder: every file is hashed again and compared with the manifest.

The module also reads the inputs of an output from its manifest, and checks whether a folder is the base of a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_merge.combine.adapter_hashes import combined_sha256
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import PATH_KEYS, Ingredient, Recipe, list_stated_options, make_recipe
from adapter_merge.errors import FileFormatError, InputError, Problem, raise_all
from adapter_merge.files.hashing import hash_files
from adapter_merge.files.symlinks import is_hub_blob
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.storage.checkpoint import open_checkpoint

from .manifest import MANIFEST, read_manifest
from .manifest_seal import check_seal
from .model_card import adapter_table
from .signature import check_signature
from .unlisted_files import list_content, stated_hashes


@dataclass(frozen=True)
class Integrity:
    """The result of a check: numbers of files and bytes that match the manifest, and what could not be compared."""

    folder: Path
    files: int
    nbytes: int
    inputs: int  # files of base and adapters that exist at the recorded path, unchanged
    moved: tuple[str, ...]  # inputs that no longer exist at the recorded path, and are not checked
    changed: tuple[str, ...]  # adapters' files that exist at the recorded path, but have changed
    beside: tuple[str, ...]  # permitted unlisted files, which no loader reads: a signature, .gitattributes
    signed: int = 0  # files covered by the checked signature; 0 where none was checked


def check_integrity(
    folder: str | Path,
    *,
    inputs: bool = False,
    public_key: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Integrity:
    """Check that `folder` holds exactly the files of its manifest; with `inputs`, check base and adapters too.

    Files are hashed; unlisted links, folders and files are refused, including hidden ones; the manifest's seal, its
    adapters' hashes and the card's table of them must agree. None of this shows who wrote the folder: `public_key`
    also checks its signature (signature.py). Without `inputs`, adapters that still exist are hashed, and reported when
    they have changed. progress: called with the bytes of each file.
    Raises InputError when there is no manifest with hashes, FileFormatError with every difference.
    """
    folder = Path(folder)
    manifest = _read_own_manifest(folder)
    if manifest is None or not manifest.get("files"):
        raise InputError(
            f"{folder}: there are no hashes to check",
            expected=f"a folder with an {MANIFEST} that holds hashes",
            got="no manifest" if manifest is None else "a manifest without hashes",
            hint="it was written with --no-hashes, or copied without its manifest",
        )
    expected = stated_hashes(folder, manifest["files"])
    content = list_content(folder, expected)
    edited = check_seal(folder / MANIFEST)
    problems = [*edited, *content.problems]
    claims = {folder / name: sha for name, sha in expected.items() if name in content.present}
    actual = hash_files(claims, workers, progress)
    differences = _find_differences(claims, actual)
    problems += differences
    if not differences and not edited:
        problems += _check_adapter_entries(folder, manifest)

    checked, moved = ({}, ()) if edited else _list_inputs(manifest, adapters_only=not inputs)
    others = _find_differences(checked, hash_files(checked, workers, progress if inputs else None))
    problems += others if inputs else []
    raise_all(problems, FileFormatError)
    signed = check_signature(folder, expected, public_key) if public_key is not None else 0
    return Integrity(
        folder,
        len(claims),
        sum(path.stat().st_size for path in claims),
        len(checked) - len(others),
        moved if inputs else (),
        tuple(problem.cause.partition(": ")[0] for problem in others),
        content.beside,
        signed,
    )


def _read_own_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of `folder`, which must not be a link, since a link's target may change."""
    file = folder / MANIFEST
    if file.is_symlink() and not is_hub_blob(folder, file):
        raise FileFormatError(f"{file}: is a symbolic link", hint="its target may change at any time")
    return read_manifest(folder)


def adapter_entries(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifest's adapters as a list; an export lists them by name."""
    entries = manifest.get("adapters") or ()
    return list(entries.values() if isinstance(entries, Mapping) else entries)


def _list_inputs(manifest: Mapping[str, Any], *, adapters_only: bool) -> tuple[dict[Path, str], tuple[str, ...]]:
    """Return sha256 by file for the inputs that exist at their recorded path, and the names of the others."""
    base = manifest.get("base") or {}
    entries = [
        entry for entry in adapter_entries(manifest) if not adapters_only or entry.get("path") != base.get("path")
    ]
    present: dict[Path, str] = {}
    moved = []
    for source in entries if adapters_only else (base, *entries):
        for name, sha in (source.get("files") or {}).items():
            file = Path(source["path"]) / name
            if file.is_file():
                present[file] = sha
            else:
                moved.append(str(file))
    return present, tuple(moved)


def _check_adapter_entries(folder: Path, manifest: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each adapter whose hash does not match its files, and for a model card that differs."""
    entries = adapter_entries(manifest)
    problems = [
        Problem(f"{folder / MANIFEST}: the sha256 of adapter {entry.get('name')} is not that of its files", hint=EDITED)
        for entry in entries
        if entry.get("files") and combined_sha256(entry["files"]) != entry.get("sha256")
    ]
    card = folder / "README.md"
    if isinstance(manifest.get("adapters"), list) and entries and card.is_file():
        text = card.read_text("utf-8", errors="replace")
        if adapter_table(()) in text and adapter_table(entries) not in text:
            problems.append(Problem(f"{card}: names other adapters than {MANIFEST}", hint=EDITED))
    return problems


EDITED = "one of the two was edited after it was written"


def _find_differences(claims: dict[Path, str], actual: dict[Path, str]) -> list[Problem]:
    """Return a problem for each file whose sha256 differs from the recorded one."""
    return [
        Problem(f"{path}: differs from the recorded file", expected=f"sha256 {sha}", got=f"sha256 {actual[path]}")
        for path, sha in claims.items()
        if actual[path] != sha
    ]


def is_merged(folder: str | Path) -> bool:
    """Return True for a merged model whose manifest holds the hashes of its base."""
    path = Path(folder)
    manifest = read_manifest(path) if path.is_dir() else None
    return manifest is not None and manifest.get("artefact") == "merged model" and bool(_base_files(manifest))


def check_restored(merged: str | Path, restored: str | Path) -> int:
    """Check that `restored` is the base of `merged`; return the number of files. Raises FileFormatError."""
    merged, restored = Path(merged), Path(restored)
    expected = _base_files(read_manifest(merged) or {})
    problems = check_seal(merged / MANIFEST)
    problems += [Problem(f"{restored}: {name} is missing") for name in expected if not (restored / name).is_file()]
    present = {path.relative_to(restored).as_posix() for path in restored.rglob("*") if path.is_file()}
    weights = {name for name in present - set(expected) if name.endswith((".safetensors", ".bin", ".index.json"))}
    problems += [Problem(f"{restored}: {name} is not one of the base's weights") for name in sorted(weights)]
    claims = {restored / name: sha for name, sha in expected.items() if name in present}
    problems += _find_differences(claims, hash_files(claims))
    raise_all(problems, FileFormatError)
    return len(claims)


def _base_files(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the sha256 of the base's files by name, as the manifest states them."""
    files: dict[str, str] = (manifest.get("base") or {}).get("files") or {}
    return files


def inputs_of(folder: str | Path) -> tuple[str | None, str | Recipe, str | None, ReadOptions | None]:
    """Return base, adapter or recipe, base_kind and options that `folder` was made from, checked to be unchanged.

    Raises InputError where the manifest's inputs do not exist, FileFormatError where they have changed.
    """
    folder = Path(folder)
    integrity = check_integrity(folder, inputs=True)
    manifest = read_manifest(folder) or {}
    base, adapters = manifest.get("base") or {}, manifest.get("adapters") or []
    problems = [Problem(f"{name}: no longer exists") for name in integrity.moved]
    if not adapters or not base.get("path") or any("stated" not in entry for entry in adapters):
        problems.append(
            Problem(f"{folder / MANIFEST}: does not state the inputs of the output", hint="state BASE and ADAPTER")
        )
    raise_all(problems, InputError)
    if base.get("fingerprint") != open_checkpoint(base["path"]).fingerprint and not _holds_base(base, adapters):
        raise InputError(f"{base['path']}: is no longer the base that {folder} was made from")
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
            list_stated_options(_read_options(entry["stated"])),
        )
        for entry in adapters
    ]
    settings = Settings(*(combination[key] for key in ("method", "density", "gamma", "seed")))
    return base["path"], make_recipe(ingredients, settings), None, None


def _holds_base(base: dict[str, Any], adapters: list[dict[str, Any]]) -> bool:
    """Return True for a checkpoint that holds both base and adapter."""
    return any(entry["path"] == base["path"] for entry in adapters)


def _read_options(stated: dict[str, Any]) -> ReadOptions:
    values: dict[str, Any] = {
        key: Path(value) if key in PATH_KEYS else value for key, value in stated.items() if not key.endswith("_sha256")
    }
    return ReadOptions(**values)
