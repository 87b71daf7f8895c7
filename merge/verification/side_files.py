"""A merged model's files beside its weights against the base's: tokenizer, chat template, generation settings.

The weights say nothing of them, and a changed one makes another model of the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import InputError
from adapter_merge.storage.checkpoint import WEIGHT_SUFFIXES, Checkpoint

from .carried_over import OF_NO_EFFECT
from .compare_logits import open_tokenizer, tokenized

COMPARED = (".json", ".jinja", ".model", ".txt", ".py")
NAMED = 6  # files in a note


def changed_side_files(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Return notes on side files that the merged model lacks, has besides, or has otherwise than the base."""
    base, made = _side_files(bound.base), _side_files(merged)
    own = {file.name for file in merged.files}
    weights = [
        path.name
        for path in sorted(merged.folder.iterdir())
        if path.name.endswith(WEIGHT_SUFFIXES) and path.name not in own and not path.name.endswith(".index.json")
    ]
    return [
        f"{text}: {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''}"
        for names, text in (
            ([name for name in base if name not in made], "files of the base that are not there"),
            ([name for name in made if name not in base], "files that the base does not have"),
            (
                [name for name, file in base.items() if name in made and not _same_content(file, made[name])],
                "files that are not the base's",
            ),
            (weights, "weights that no index names"),
        )
        if names
    ]


def other_tokens(bound: BoundAdapter, folder: Path, prompts: Sequence[str] | None) -> list[str]:
    """Return the problem where the artefact's tokenizer, or its chat template, is another one than the base's."""
    base = open_tokenizer(bound.base.folder)
    if base is None:
        return []
    try:
        made = open_tokenizer(folder)
        if made is None:
            return []
        wanted, got = tokenized(bound.base.folder, prompts) or [], tokenized(folder, prompts) or []
    except InputError as error:
        return [error.problems[0].cause]
    count = sum(not torch.equal(one, two) for one, two in zip(wanted, got, strict=True))
    if count:
        return [f"its tokenizer makes other tokens than the base's of {count} of {len(wanted)} prompts"]
    if base.get_vocab() != made.get_vocab():
        return ["its tokenizer has another vocabulary than the base's"]
    return []


def _side_files(model: Checkpoint) -> dict[str, Path]:
    stored = model.stored or model
    return {
        path.as_posix(): stored.folder / path
        for path in stored.side_files
        if path.suffix in COMPARED and path.name not in ("config.json", "adapter_merge.json")
    }


def _same_content(first: Path, second: Path) -> bool:
    """Return True for equal bytes, and for JSON objects that are equal but for keys without effect."""
    if first.read_bytes() == second.read_bytes():
        return True
    if first.suffix != ".json":
        return False
    try:
        one, two = (_without_effect(json.loads(file.read_text("utf-8"))) for file in (first, second))
    except ValueError:
        return False
    return bool(one == two)


def _without_effect(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if key not in OF_NO_EFFECT}
