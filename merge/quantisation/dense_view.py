"""The dense view of a quantised base: a checkpoint in which every quantised weight appears as a dequantised tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_merge.quantisation.detection import find_quantised_weights
from adapter_merge.quantisation.gguf.checkpoint import gguf_file, open_gguf
from adapter_merge.quantisation.packed_weight import PackedWeight, dense_ref
from adapter_merge.storage.checkpoint import Checkpoint, open_checkpoint, resolve_base
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.safetensors_header import TensorRef

from .known_settings import LOCATIONS, SIDE_FILE

# Files in which quantisation tools repeat the config. Beside dense weights they would mislead loaders.
SETTINGS_FILES = frozenset((SIDE_FILE, "quantize_config.json", "quant_config.json"))


def open_base(folder: str | Path) -> Checkpoint:
    """Open the model in `folder` (a path, a hub id or a GGUF file); return the dense view of a quantised model.

    Raises InputError, FileFormatError or UnsupportedError with every problem.
    """
    path = resolve_base(folder)
    file = gguf_file(path)
    return dense_view(open_checkpoint(path)) if file is None else open_gguf(file)


def dense_view(base: Checkpoint) -> Checkpoint:
    """Return `base` as an unquantised checkpoint; `base` itself where none of its weights is quantised.

    Each quantised weight becomes one ComputedRef, at the position of its first stored tensor, in the dtype that its
    library dequantises to. The view has no stored parts, no activation scales, no quantization_config, and no side
    files that repeat the config; all other tensors and files are those of the base. No weight is read.
    """
    packed = find_quantised_weights(base)
    if not packed.weights:
        return base
    places = {next(iter(weight.parts.values())).name: weight for weight in packed.weights.values()}
    shards = []
    for shard in base.shards:
        tensors = tuple(
            dense_ref(places[ref.name]) if ref.name in places else ref
            for ref in shard.tensors
            if ref.name in places or ref.name not in packed.side
        )
        if tensors:
            shards.append(replace(shard, tensors=tensors, is_whole=shard.is_whole and tensors == shard.tensors))
    return replace(
        base,
        shards=tuple(shards),
        config=_dense_config(base.config),
        stored=base,
        left_out=SETTINGS_FILES,
        notes=packed.notes,
    )


def packed_weight(ref: TensorRef) -> PackedWeight | None:
    """Return the quantised weight that `ref` is computed from, or None for a stored tensor."""
    return ref.source if isinstance(ref, ComputedRef) and isinstance(ref.source, PackedWeight) else None


def packed_weights(base: Checkpoint) -> dict[str, PackedWeight]:
    """Return the quantised weights of a dense view by name."""
    found = {name: packed_weight(ref) for name, ref in base.tensors.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def _dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without its quantization_config, which may also stand in its text_config."""
    dense = {key: value for key, value in config.items() if key not in LOCATIONS}
    text = dense.get("text_config")
    if isinstance(text, dict):
        dense["text_config"] = {key: value for key, value in text.items() if key not in LOCATIONS}
    return dense
