"""The files of a merged model beside its weights: side files, config, index, card, and the hashes of all files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.combine.adapter_hashes import relative_name
from adapter_merge.engine.execute import FinishedShard
from adapter_merge.engine.plan import MergePlan
from adapter_merge.files.hashing import hash_files
from adapter_merge.storage.checkpoint import CANDIDATES

from .leftovers import PREIMAGE_FOLDER, remove
from .manifest import MANIFEST
from .model_card import merged_card
from .preimage import SIDE
from .staging import copy_synced, write_json, write_text
from .unlisted_files import SIGNATURE


def write_side_files(
    plan: MergePlan, folder: Path, content: Mapping[str, Any], title: str, keep_preimage: bool
) -> None:
    """Write all files of a merged model except its weights and manifest; files of an earlier run are removed first."""
    for path in folder.iterdir():
        if path.name != PREIMAGE_FOLDER and path.name not in {shard.file for shard in plan.shards}:
            remove(path)
    _copy_side_files(plan, folder)
    if plan.config is not None:
        write_text(folder / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
    index = plan.index()
    if index is not None:
        write_json(folder / plan.index_name, index)
    write_text(folder / "README.md", merged_card(content, title, plan.config or plan.base.config))
    if keep_preimage:
        side = folder / PREIMAGE_FOLDER / SIDE
        remove(side)
        side.mkdir()
        for relative in _base_side(plan):
            if relative in plan.side_files and relative not in _replaced(plan):
                continue
            (side / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_synced(plan.base.folder / relative, side / relative)


def _replaced(plan: MergePlan) -> set[Path]:
    """Return the side files of the base that the output replaces by its own."""
    own = {Path("README.md"), Path(MANIFEST), Path(SIGNATURE)}
    return own | {Path("config.json")} if plan.config is not None else own


def _base_side(plan: MergePlan) -> list[Path]:
    """Return the base's side files and its index; the manifest records them, and `restore` writes them again."""
    first = next((name for name in CANDIDATES if (plan.base.folder / name).is_file()), "")
    return [*_side_files(plan), *([Path(first)] if first.endswith(".index.json") else [])]


def _side_files(plan: MergePlan) -> list[Path]:
    """Return the base's side files that the output copies: all but the pre-image of an earlier merge."""
    return [path for path in plan.side_files if path.parts[0] != PREIMAGE_FOLDER]


def planned_files(plan: MergePlan) -> list[str]:
    """Return the names of all files that a merge writes, without those of a pre-image."""
    names = {path.as_posix() for path in _side_files(plan)} | {shard.file for shard in plan.shards}
    names |= {"README.md", MANIFEST} | ({"config.json"} if plan.config is not None else set())
    return sorted(names | ({plan.index_name} if len(plan.shards) > 1 else set()))


def base_files(plan: MergePlan, finished: Mapping[str, FinishedShard]) -> dict[str, str]:
    """Return the sha256 of the base's files: weights as hashed while read, other files hashed now."""
    known = {
        shard.source.name: sha
        for shard in plan.shards
        if shard.source is not None and (sha := finished[shard.file].source_sha256) is not None
    }
    folder = plan.base.folder
    weights = [file for file in plan.base.files if file.name not in known]
    hashes = hash_files([*weights, *(folder / relative for relative in _base_side(plan))])
    return dict(sorted((known | {relative_name(path, folder): sha for path, sha in hashes.items()}).items()))


def output_files(folder: Path, finished: Mapping[str, FinishedShard]) -> dict[str, str]:
    """Return the sha256 of the output's files: weights as hashed while written, other files hashed now."""
    weights = {name: shard.sha256 for name, shard in finished.items() if shard.sha256 is not None}
    others = [
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() not in weights
    ]
    hashes = {path.relative_to(folder).as_posix(): sha for path, sha in hash_files(others).items()}
    return dict(sorted((weights | hashes).items()))


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    """Copy the base's side files that the output does not replace."""
    for relative in _side_files(plan):
        if relative in _replaced(plan):
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_synced(plan.base.folder / relative, target)
