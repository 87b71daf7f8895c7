"""Comparison of a merged model's side files with the base's: tokenizer, chat template, generation settings.

These files change the model's answers as weights do.
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

from .compare_logits import open_tokenizer, tokenized
from .unchanged_tensors import WITHOUT_EFFECT

COMPARED = (".json", ".jinja", ".model", ".txt", ".py")
NAMED = 6  # largest number of files that a note names


def changed_side_files(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Return notes on side files of the merged model that are missing, added or changed."""
    base, made = _list_side_files(bound.base), _list_side_files(merged)
    return [
        f"{text}: {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''}"
        for names, text in (
            ([name for name in base if name not in made], "files of the base that are missing"),
            ([name for name in made if name not in base], "files that the base does not have"),
            (
                [name for name, file in base.items() if name in made and not _same_content(file, made[name])],
                "files that are not the base's",
            ),
        )
        if names
    ]


def find_program_problems(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Return the problems of files that other programs load as the model: weights in no index, and the model's code.

    vLLM reads every safetensors file of a folder without an index; transformers runs the code that `auto_map` names.
    """
    indexed = {file.name for file in merged.files}
    weights = [
        path.name
        for path in sorted(merged.folder.iterdir())
        if path.name.endswith(WEIGHT_SUFFIXES) and path.name not in indexed and not path.name.endswith(".index.json")
    ]
    base, made = _list_side_files(bound.base), _list_side_files(merged)
    code = [name for name in sorted({*base, *made}) if name.endswith(".py") and "auto_map" in merged.config]
    changed = [
        name for name in code if name not in base or name not in made or not _same_content(base[name], made[name])
    ]
    return [
        *(
            [f"weights that no index names, which other programs may load: {', '.join(weights[:NAMED])}"]
            * bool(weights)
        ),
        *([f"the model's code is not the base's: {', '.join(changed[:NAMED])}"] * bool(changed)),
    ]


def find_tokenizer_problems(bound: BoundAdapter, folder: Path, prompts: Sequence[str] | None) -> list[str]:
    """Return a problem where the artefact's tokenizer or chat template is not the base's."""
    base = open_tokenizer(bound.base.folder)
    if base is None:
        return []
    try:
        made = open_tokenizer(folder)
        if made is None:
            return []
        expected, actual = tokenized(bound.base.folder, prompts) or [], tokenized(folder, prompts) or []
    except InputError as error:
        return [error.problems[0].cause]
    count = sum(not torch.equal(first, second) for first, second in zip(expected, actual, strict=True))
    if count:
        return [f"its tokenizer encodes {count} of {len(expected)} prompts differently from the base's"]
    if base.get_vocab() != made.get_vocab():
        return ["its tokenizer has another vocabulary than the base's"]
    return []


def _list_side_files(model: Checkpoint) -> dict[str, Path]:
    """Return the compared side files by their relative paths."""
    stored = model.stored or model
    return {
        path.as_posix(): stored.folder / path
        for path in stored.side_files
        if path.suffix in COMPARED and path.name not in ("config.json", "adapter_merge.json")
    }


def _same_content(first: Path, second: Path) -> bool:
    """Return True for equal bytes, and for JSON objects that are equal except for keys without effect."""
    if first.read_bytes() == second.read_bytes():
        return True
    if first.suffix != ".json":
        return False
    try:
        left, right = (_drop_ignored_keys(json.loads(file.read_text("utf-8"))) for file in (first, second))
    except ValueError:
        return False
    return bool(left == right)


def _drop_ignored_keys(content: Any) -> Any:
    """Return a JSON object without the keys that have no effect; any other value unchanged."""
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if key not in WITHOUT_EFFECT}
