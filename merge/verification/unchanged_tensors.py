"""Comparison of a merged model's unadapted tensors with the base's, byte for byte, and of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WITHOUT_EFFECT = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")  # keys of config.json


def compare_unadapted(
    bound: BoundAdapter, merged: Checkpoint, progress: Callable[[int], None] | None = None
) -> tuple[int, list[str]]:
    """Return the number of compared unadapted tensors, and a problem for each missing, added or changed one."""
    edited = {item.name for item in bound.modules}
    expected = {**bound.base.tensors, **bound.copies, **bound.replacements}
    tied = expected_config(bound).get("tie_word_embeddings")
    problems, compared = [], 0
    sources = Sources()
    try:
        for name, ref in expected.items():
            written = merged.tensors.get(name)
            if name in edited:
                continue
            if written is None:
                if not (name.endswith(OUTPUT_HEADS) and tied):
                    problems.append(f"{name} is missing")
                continue
            compared += 1
            if not same_values(ref, written, sources):
                problems.append(f"{name} was changed")
            if progress is not None:
                progress(ref.nbytes)
    finally:
        sources.close()
    problems += [f"{name} was added" for name in merged.tensors if name not in expected and name not in edited]
    return compared, problems


def expected_config(bound: BoundAdapter) -> dict[str, Any]:
    """Return the config that the merged model must have: the base's, with the adapter's changes."""
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


def find_config_problems(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Return a problem for each setting of the merged model's config that is not the expected one."""
    expected, stated = expected_config(bound), dict(merged.config)
    keys = sorted({*expected, *stated} - set(WITHOUT_EFFECT))
    bad = [key for key in keys if expected.get(key) != stated.get(key)]
    problems = [f"config.json: {key} is {stated.get(key)!r} instead of {expected.get(key)!r}" for key in bad]
    dtype = _stated_dtype(stated)
    if dtype != _stated_dtype(expected) and dtype != _most_common_dtype(merged):
        problems.append(f"config.json: states {dtype!r}, and its weights are in {_most_common_dtype(merged)}")
    return problems


def find_dtype_problems(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Return a problem where tensors that had one dtype in an unquantised base now have several."""
    if bound.base.stored is not None or merged.stored is not None:
        return []
    written: dict[str, dict[str, str]] = {}  # dtype in the base -> dtype in the merged model -> name of a tensor
    for name, ref in bound.base.tensors.items():
        if name in merged.tensors and name not in bound.replacements:
            written.setdefault(ref.dtype, {}).setdefault(merged.tensors[name].dtype, name)
    return [
        f"tensors of the base in {dtype} are now in several dtypes: "
        + ", ".join(f"{name} in {other}" for other, name in names.items())
        for dtype, names in written.items()
        if len(names) > 1
    ]


def _stated_dtype(config: Mapping[str, Any]) -> object:
    """Return the dtype in which transformers loads a model of this config, None where it states none."""
    return config.get("dtype", config.get("torch_dtype"))


def _most_common_dtype(model: Checkpoint) -> str | None:
    """Return the dtype of most of the model's floating-point bytes, as configs name it."""
    sizes: dict[str, int] = {}
    for ref in model.tensors.values():
        if ref.dtype in CONFIG_DTYPES:
            sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return CONFIG_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None


def same_values(ref: TensorRef, stored: TensorRef, sources: Sources) -> bool:
    """Return True where `stored` has the values of `ref`, rounded once to the dtype of `stored`."""
    if ref.dtype == stored.dtype:
        return same_bytes(ref, stored)
    if ref.shape != stored.shape or stored.dtype not in ("F64", "F32", *HALVES):
        return False
    dtype = TORCH_DTYPES[stored.dtype]
    return all(
        torch.equal(read_rows(sources, ref, *rows).to(dtype), read_rows(sources, stored, *rows))
        for rows in row_blocks(ref)
    )
