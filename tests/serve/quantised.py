"""The tests' tiny base in four bits, in the layouts of compressed-tensors, AWQ and GPTQ, with its dense weights.

Written from the formats' own definitions, groups of 64 columns, scales float16:

    pack-quantized  weight_packed (out, in / 8) int32, eight nibbles from the lowest on; w = (nibble - 8) scale
    awq             qweight (in, out / 8), nibbles in the order 0 2 4 6 1 3 5 7; w = (nibble - zero) scale
    gptq            qweight (in / 8, out), qzeros hold zero - 1; w = (nibble - zero) scale
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
KINDS = ("pack-quantized", "awq", "gptq")
CONFIGS: dict[str, dict[str, Any]] = {
    "pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                },
            }
        },
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
}  # fmt: skip


def packed(values: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """(..., n) nibbles -> (..., n / 8) int32, the first of `order` in the lowest bits."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    whole = sum(eights[..., column] << 4 * place for place, column in enumerate(order))
    assert isinstance(whole, Tensor)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def quantise(base: Path, folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """Write `base` with its layers' linear weights in four bits; (folder, its dense weights in float64)."""
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if weight.ndim != 2 or not name.endswith("_proj.weight"):
            tensors[name] = weight.half()
            dense[name] = tensors[name].double()
            continue
        module = name.removesuffix(".weight")
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        if kind == "awq":
            scale = ((high - low) / 15).half()
            zero = (-low / scale.float()).round().clamp(0, 15)
        else:
            scale = (torch.maximum(high, -low) / 7).half()
            zero = torch.full_like(low, 8)
        codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
        dense[name] = ((codes - zero[..., None]).double() * scale.double()[..., None]).flatten(1)
        codes = codes.flatten(1)
        if kind == "pack-quantized":
            tensors[f"{module}.weight_packed"] = packed(codes)
            tensors[f"{module}.weight_scale"] = scale
            tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
        elif kind == "awq":
            tensors[f"{module}.qweight"] = packed(codes.T, AWQ_ORDER).contiguous()
            tensors[f"{module}.qzeros"] = packed(zero.T, AWQ_ORDER).contiguous()
            tensors[f"{module}.scales"] = scale.T.contiguous()
        else:
            tensors[f"{module}.qweight"] = packed(codes).T.contiguous()
            tensors[f"{module}.qzeros"] = packed(zero.T - 1).contiguous()
            tensors[f"{module}.scales"] = scale.T.contiguous()
            tensors[f"{module}.g_idx"] = (torch.arange(weight.shape[1]) // GROUP).to(torch.int32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": CONFIGS[kind], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    for file in base.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, dense
