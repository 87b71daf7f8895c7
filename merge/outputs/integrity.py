"""The proof that an output is what was written: every file hashed again and held against the manifest.

And what follows from a manifest: which inputs it names, and whether a folder is the base of a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.open_inputs import combined_sha256
from adapter_merge.combine.recipe import PATH_KEYS, Ingredient, Recipe, given_options, make_recipe
from adapter_merge.errors import FileFormatError, InputError, Problem, raise_all
from adapter_merge.formats.read_options import ReadOptions
from adapter_merge.storage.checkpoint import open_checkpoint
from adapter_merge.storage.hashing import hash_files

from .folder_content import is_hub_blob, list_content, stated_hashes
from .model_card import adapter_table
from .seal import check_seal
from .signature import check_signature
from .staging import MANIFEST, read_manifest


@dataclass(frozen=True)
class Integrity:
    """What was proved."""

    folder: Path
    files: int
    nbytes: int
    inputs: int  # files of base and adapters that are still where the manifest says, and still the same
    moved: tuple[str, ...]  # inputs that are no longer there: nothing is known of them
    changed: tuple[str, ...]  # adapters' files that lie where the manifest says, and are others by now
    beside: tuple[str, ...]  # files that no manifest lists and no loader reads: a signature, .gitattributes
    signed: int = 0  # files under the signature that was checked; 0 where none was


def check_integrity(
    folder: str | Path,
    *,
    inputs: bool = False,
    public_key: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Integrity:
    """Prove that `folder` holds what its manifest says and nothing else; `inputs` proves base and adapters too.

    Files are hashed; links, folders and files that are not listed are refused, hidden ones as well; the manifest's
    seal, its adapters' hashes and the card's table of them must agree. None of this tells who wrote the folder:
    `public_key` checks its signature too (signature.py). Without `inputs` the adapters are hashed where they still
    lie, and reported when they have changed. progress: called with the bytes of each file.
    Raises InputError when there is no manifest with hashes, and FileFormatError naming all that is not as written.
    """
    folder = Path(folder)
    manifest = _sealed_manifest(folder)
    if manifest is None or not manifest.get("files"):
        raise InputError(
            f"{folder}: nothing to prove",
            expected=f"a folder with an {MANIFEST} that holds hashes",
            got="no manifest" if manifest is None else "a manifest without hashes",
            hint="was it written with --no-hashes, or copied without its manifest?",
        )
    expected = stated_hashes(folder, manifest["files"])
    content = list_content(folder, expected)
    edited = check_seal(folder / MANIFEST)
    problems = [*edited, *content.problems]
    claims = {folder / name: sha for name, sha in expected.items() if name in content.present}
    found = hash_files(claims, workers, progress)
    wrong = _differences(claims, found)
    problems += wrong
    if not wrong and not edited:
        problems += _other_adapters(folder, manifest)

    checked, moved = ({}, ()) if edited else _named_files(manifest, adapters_only=not inputs)
    others = _differences(checked, hash_files(checked, workers, progress if inputs else None))
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


def _sealed_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, which must be a file of its own: what a link leads to may change."""
    file = folder / MANIFEST
    if file.is_symlink() and not is_hub_blob(folder, file):
        raise FileFormatError(f"{file}: is a symbolic link", hint="its target may change at any time")
    return read_manifest(folder)


def adapter_entries(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest's adapters; an export has them by name."""
    entries = manifest.get("adapters") or ()
    return list(entries.values() if isinstance(entries, Mapping) else entries)


def _named_files(manifest: Mapping[str, Any], *, adapters_only: bool) -> tuple[dict[Path, str], tuple[str, ...]]:
    """(sha256 by file of the inputs that still lie where the manifest says, those that do not)."""
    base = manifest.get("base") or {}
    entries = [
        entry for entry in adapter_entries(manifest) if not adapters_only or entry.get("path") != base.get("path")
    ]
    there: dict[Path, str] = {}
    gone = []
    for source in entries if adapters_only else (base, *entries):
        for name, sha in (source.get("files") or {}).items():
            file = Path(source["path"]) / name
            if file.is_file():
                there[file] = sha
            else:
                gone.append(str(file))
    return there, tuple(gone)


def _other_adapters(folder: Path, manifest: Mapping[str, Any]) -> list[Problem]:
    """Adapters whose hash is not that of their files, or that the model card tells otherwise."""
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
    problems = check_seal(merged / MANIFEST)
    problems += [Problem(f"{restored}: {name} is missing") for name in expected if not (restored / name).is_file()]
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
