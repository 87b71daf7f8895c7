"""What a merged model carries over from its base: tensors that are not adapted, byte for byte, and the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.open_inputs import is_stale_quantization
from adapter_merge.storage.checkpoint import OUTPUT_HEADS, Checkpoint
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .weight_formulas import read_rows, row_blocks

HALVES = ("BF16", "F16")
OF_NO_EFFECT = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")  # keys of config.json


def carried_over(
    bound: BoundAdapter, merged: Checkpoint, progress: Callable[[int], None] | None = None
) -> tuple[int, list[str]]:
    """How many tensors that are not adapted were compared, and which are missing, added or changed."""
    edited = {item.name for item in bound.modules}
    expected = {**bound.base.tensors, **bound.copies, **bound.replacements}
    tied = expected_config(bound).get("tie_word_embeddings")
    problems, compared = [], 0
    sources = Sources()
    try:
        for name, ref in expected.items():
            found = merged.tensors.get(name)
            if name in edited:
                continue
            if found is None:
                if not (name.endswith(OUTPUT_HEADS) and tied):
                    problems.append(f"{name} is missing")
                continue
            compared += 1
            if not same_values(ref, found, sources):
                problems.append(f"{name} was changed")
            if progress is not None:
                progress(ref.nbytes)
    finally:
        sources.close()
    problems += [f"{name} was added" for name in merged.tensors if name not in expected and name not in edited]
    return compared, problems


def expected_config(bound: BoundAdapter) -> dict[str, Any]:
    """What the merged model's config.json must say: the base's, and what the adapter changes of it."""
    config = dict(bound.base.config)
    if is_stale_quantization(bound.base):
        config.pop("quantization_config", None)
    for key, value in bound.config_changes.items():
        inner = config.get("text_config")
        if isinstance(inner, dict) and key not in config:
            config["text_config"] = {**inner, key: value}
        else:
            config[key] = value
    return config


def config_problems(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Settings of the merged model that neither the base nor the adapter has: the same weights, another model."""
    wanted, found = expected_config(bound), dict(merged.config)
    keys = sorted({*wanted, *found} - set(OF_NO_EFFECT))
    bad = [key for key in keys if wanted.get(key) != found.get(key)]
    return [f"config.json: {key} is {found.get(key)!r} instead of {wanted.get(key)!r}" for key in bad]


def same_values(ref: TensorRef, found: TensorRef, sources: Sources) -> bool:
    if ref.dtype == found.dtype:
        return same_bytes(ref, found)
    if ref.shape != found.shape or found.dtype not in ("F64", "F32", *HALVES):
        return False
    kept = TORCH_DTYPES[found.dtype]
    return all(
        torch.equal(read_rows(sources, ref, *rows).to(kept), read_rows(sources, found, *rows))
        for rows in row_blocks(ref)
    )
