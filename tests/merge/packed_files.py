"""Quantised checkpoints on disk that the schemes' own libraries have packed, and a reader of their bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter_merge.quantisation.detection import find_quantised_weights
from adapter_merge.quantisation.quantised_weights import QuantisedWeights
from adapter_merge.storage.checkpoint import open_checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

LINEAR = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{LINEAR}.weight"


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None) -> Path:
    """Write a checkpoint with a plain norm beside `tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    everything |= {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(everything, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def find(folder: Path) -> QuantisedWeights:
    return find_quantised_weights(open_checkpoint(folder))


def read(ref: TensorRef, start: int, stop: int) -> Tensor:
    """Read bytes start .. stop of a stored tensor, and refuse to leave it."""
    assert 0 <= start <= stop <= ref.nbytes, f"{ref.name}: bytes {start} .. {stop} of {ref.nbytes}"
    with ref.file.open("rb") as stream:
        stream.seek(ref.start + start)
        data = bytearray(stream.read(stop - start))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def all_rows(folder: Path, name: str = WEIGHT, step: int = 0) -> Tensor:
    """Return a weight dequantised in blocks of `step` rows (all at once by default), in its dense shape."""
    weight = find(folder).weights[name]
    step = step or weight.row_count
    blocks = [weight.rows(read, first, min(step, weight.row_count - first))
              for first in range(0, weight.row_count, step)]  # fmt: skip
    return torch.cat(blocks).reshape(weight.shape)


def retention(packed: Tensor, stored: Tensor, wanted: Tensor) -> float:
    """<Q(W') - W, W' - W> / |W' - W|^2."""
    change = (wanted.double() - stored.double()).flatten()
    return float((packed.double() - stored.double()).flatten() @ change / (change @ change))


def write_packed(folder: Path, out: Path, name: str, dense: Tensor) -> Path:
    """Write the checkpoint of `folder` anew to `out` with the weight `name` requantised from `dense`."""
    from safetensors.torch import load_file

    weight = find(folder).weights[name]
    tensors = load_file(folder / "model.safetensors")
    for role, tensor in weight.pack(dense, read).items():
        stored = tensors[weight.parts[role].name]
        assert (tensor.dtype, tensor.shape) == (stored.dtype, stored.shape), role
        tensors[weight.parts[role].name] = tensor.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out
