"""Functions that read a model's tensors when they are needed, in the dtype that the model computes in."""

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
    """Return a function per tensor of `base`, with `changed` (by dense name) in place of its own or beside them.

    For a quantised base that transformers dequantises itself, the functions read the packed tensors as they are stored,
    and the second value is the quantiser that they are for; else it is None.
    """
    changed = changed or {}
    quantiser = own_quantiser(base)
    if quantiser is None:
        return {**file_sources(base.tensors, dtype), **changed}, None
    assert base.stored is not None
    packed = packed_weights(base)
    dropped = {part.name for name in changed if name in packed for part in packed[name].parts.values()}
    sources: dict[str, Source] = {}
    for name, ref in base.stored.tensors.items():
        if name in base.tensors and name not in packed:
            sources |= file_sources({name: ref}, dtype)
        elif name not in dropped:
            sources[name] = lambda ref=ref: read_tensor(ref)  # type: ignore[misc]
    return {**sources, **changed}, quantiser
