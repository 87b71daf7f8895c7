"""LoRA adapter of llama.cpp: one GGUF file with the layout of convert_lora_to_gguf.py in ggml-org/llama.cpp.

general.type "adapter", adapter.type "lora", general.architecture as of the base, adapter.lora.alpha
NAME.lora_a (R, in), NAME.lora_b (out, R)     float32; NAME is the base tensor's name in llama.cpp

llama.cpp computes W0 + alpha / R lora_b lora_a, with R taken from each tensor and one alpha for the file: alpha is the
most common rank, and lora_b of another rank is multiplied by R / alpha. The rows of lora_b are in the order in which
llama.cpp stores those of the weight.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.quantisation.gguf.names import (
    Architecture,
    architecture_of,
    gguf_name,
    require_gguf,
    rotated_heads,
    written_rows,
)

from .supported import MaybeBoundModule
from .weight_factors import Factored

GGUF_ADAPTER = "adapter.gguf"
MERGE_INSTEAD = "merge this adapter instead, and convert the merged model"


def check_gguf(bound: BoundAdapter | None, pairs: Sequence[MaybeBoundModule], truncated: bool) -> None:
    """Raise for parts that a LoRA of llama.cpp cannot hold: row scales, embeddings, heads, biases, unknown names.

    truncated: the factors are truncated to a rank, so that they have no row scale. Raises InputError without a base,
    UnsupportedError with every problem.
    """
    require_gguf("writing a llama.cpp adapter")
    if bound is None:
        raise InputError(
            "a llama.cpp adapter needs the base's names and architecture", expected="BASE, whose config has them"
        )
    where, config = bound.base.folder, bound.base.config
    architecture = architecture_of(config, where)
    layers = layer_count(bound)
    problems = []
    scaled = [module.name for module, _ in pairs if module.magnitude is not None or module.own_magnitude]
    if scaled and not truncated:
        problems.append(_row_scale_problem(scaled))
    for module, weight in pairs:
        assert weight is not None, "these architectures store no weight in several parts"
        unsupported = None
        if module.embedding:
            unsupported = "an adapted embedding"
        elif weight.name not in bound.base.tensors:
            unsupported = "an adapted head that is tied to the embedding in the base"
        elif gguf_name(architecture, layers, weight.name) is None:
            unsupported = "a weight that llama.cpp has no name for"
        if unsupported is not None:
            problems.append(Problem(f"{weight.name}: {unsupported}", hint=MERGE_INSTEAD))
    problems += [
        Problem(f"{name}: trained as a whole tensor, which a llama.cpp adapter cannot hold", hint=MERGE_INSTEAD)
        for name in sorted(bound.replacements)
    ]
    raise_all(problems[:10], UnsupportedError)


def _row_scale_problem(names: Sequence[str]) -> Problem:
    """Return the problem of factors with row scales."""
    return Problem(
        f"{names[0]}: a llama.cpp adapter has no row scale, which DoRA and DuDe need",
        expected="a plain LoRA",
        got=f"row scales of {len(names)} weights",
        hint="truncate it to a plain LoRA with --rank, or merge it",
    )


def layer_count(bound: BoundAdapter) -> int:
    """Return num_hidden_layers of the base. Raises InputError where its config does not state it."""
    layers = bound.base.config.get("num_hidden_layers")
    if not isinstance(layers, int) or layers <= 0:
        raise InputError(f"{bound.base.folder}: its config states no num_hidden_layers", got=f"{layers!r:.50}")
    return layers


def write_gguf_adapter(
    folder: Path, bound: BoundAdapter, pairs: Sequence[MaybeBoundModule], factored: Sequence[Factored]
) -> None:
    """Write the factors as GGUF_ADAPTER into `folder`, and fsync it. Raises UnsupportedError for a row scale."""
    gguf = require_gguf("writing a llama.cpp adapter")
    architecture, layers = architecture_of(bound.base.config, bound.base.folder), layer_count(bound)
    scaled = [item.name for item in factored if item.magnitude is not None]
    if scaled:
        raise UnsupportedError([_row_scale_problem(scaled)])
    alpha = Counter(item.down.shape[0] for item in factored).most_common(1)[0][0] or 1
    file = folder / GGUF_ADAPTER
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for item, (_, weight) in zip(factored, pairs, strict=True):
        assert weight is not None
        name = gguf_name(architecture, layers, weight.name)
        assert name is not None
        if item.down.shape[0] == 0:
            continue  # dW is zero: llama.cpp divides by the rank
        down, up = _as_llama_cpp(item, architecture, name, bound, alpha)
        writer.add_tensor(f"{name}.lora_a", down.numpy())
        writer.add_tensor(f"{name}.lora_b", up.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _as_llama_cpp(
    item: Factored, architecture: Architecture, name: str, bound: BoundAdapter, alpha: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_a (R, in) and lora_b (out, R), float32 and contiguous."""
    up, rank = item.up, item.down.shape[0]
    if rank != alpha:
        up = (up.to(torch.float64) * (rank / alpha)).to(torch.float32)
    heads = rotated_heads(architecture, name, bound.base.config)
    if heads is not None:
        up = up[written_rows(up.shape[0], heads, name)]
    return item.down.to(torch.float32).contiguous(), up.to(torch.float32).contiguous()
