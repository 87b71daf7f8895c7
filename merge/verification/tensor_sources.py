"""Functions that read a model's tensors when a forward needs them, in the dtype of the computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .own_quantiser import Quantiser, own_quantiser

Source: TypeAlias = Callable[[], Tensor]


def file_sources(tensors: Mapping[str, TensorRef], dtype: torch.dtype) -> dict[str, Source]:
    """Return a function per tensor that reads it in `dtype`."""
    return {name: lambda ref=ref: read_tensor(ref).to(dtype) for name, ref in tensors.items()}  # type: ignore[misc]


def base_sources(
    base: Checkpoint, dtype: torch.dtype, changed: Mapping[str, Source] | None = None
) -> tuple[dict[str, Source], Quantiser | None]:
    """Return a function per tensor of `base`, and the quantiser that dequantises what they read.

    changed: functions, by dense name, that replace those of the base or are added to them. Where transformers does not
    dequantise the base, the functions return dense tensors and the quantiser is None.
    """
    changed = changed or {}
    quantiser = own_quantiser(base)
    if quantiser is None:
        return {**file_sources(base.tensors, dtype), **changed}, None
    assert base.stored is not None
    packed = packed_weights(base)
    replaced = {part.name for name in changed if name in packed for part in packed[name].parts.values()}
    sources: dict[str, Source] = {}
    for name, ref in base.stored.tensors.items():
        if name in base.tensors and name not in packed:
            sources |= file_sources({name: ref}, dtype)
        elif name not in replaced:
            sources[name] = lambda ref=ref: read_tensor(ref)  # type: ignore[misc]
    return {**sources, **changed}, quantiser
