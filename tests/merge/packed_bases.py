"""Pico bases of schemes whose libraries pack on a GPU alone (GPTQ, AWQ), and gpt-oss with MXFP4 experts.

Codes are packed by the formats' published layouts; the dequantised weights are compressed-tensors' (AWQ) and
transformers' (gpt-oss), or the formula in float64, rounded once (GPTQ).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico_bases
import torch
from pico_bases import quiet
from quantised_bases import config_of, llama
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map: the output in each place of a word
KINDS = ("gptq", "gptq act-order v2", "awq")
Dense = dict[str, Tensor]


def words(codes: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """Pack 4-bit `codes` (n, m) along the last dimension into int32 (n, m / 8), place p holding output `order[p]`."""
    taken = codes.long().unflatten(-1, (-1, 8))[..., list(order)]
    packed = (taken << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def packed_base(kind: str, folder: Path, hidden: int = 64) -> tuple[Path, Dense]:
    """Save a Llama in `folder` whose linear layers are of 4 bits; return it, and the dequantised weights by name."""
    model = llama(hidden, torch.float16)
    tensors: Dense = {}
    dense: Dense = {}
    for name, value in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = dense[name] = value
            continue
        made, dense[name] = _awq(value) if kind == "awq" else _gptq(value, kind)
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in made.items()}
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = config_of(folder)
    config["quantization_config"] = (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        if kind == "awq"
        else {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": "act-order" in kind, "sym": False,
              "checkpoint_format": "gptq_v2" if "v2" in kind else "gptq"}
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder, dense


def _rounded(weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (in, out), zeros and scales (groups, out) of `weight` (out, in): the nearest, asymmetric in each group."""
    count = int(groups.max()) + 1
    values = weight.double().T
    high = torch.stack([values[groups == index].amax(0) for index in range(count)]).clamp(min=0)
    low = torch.stack([values[groups == index].amin(0) for index in range(count)]).clamp(max=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.double()).round().clamp(1, 15)
    codes = (values / scales.double()[groups] + zeros[groups]).round().clamp(0, 15)
    return codes.long(), zeros.long(), scales


def _gptq(weight: Tensor, kind: str) -> tuple[Dense, Tensor]:
    groups = torch.arange(weight.shape[1]) // GROUP
    if "act-order" in kind:
        groups = groups[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))]
    codes, zeros, scales = _rounded(weight, groups)
    stored = zeros if "v2" in kind else zeros - 1
    dense = ((codes - zeros[groups]).double() * scales.double()[groups]).T
    return {"qweight": words(codes.T).T.contiguous(), "qzeros": words(stored), "scales": scales,
            "g_idx": groups.int()}, dense.float().half()  # fmt: skip


def _awq(weight: Tensor) -> tuple[Dense, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    codes, zeros, scales = _rounded(weight, torch.arange(weight.shape[1]) // GROUP)
    tensors = {"qweight": words(codes, AWQ_ORDER), "qzeros": words(zeros, AWQ_ORDER), "scales": scales}
    converter = AutoAWQConverter(group_size=GROUP, ignore=())
    converted = converter.process({f"m.{name}": tensor for name, tensor in tensors.items()})
    (scheme,) = converter._build_quant_config().config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    return tensors, compressor.decompress(state, scheme)["weight"]


def _mxfp4(weight: Tensor) -> Dense:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    groups = weight.unflatten(-1, (-1, scheme.weights.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    packed: Dense = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    return packed


def gpt_oss_base(folder: Path) -> tuple[Path, Dense]:
    """A gpt-oss whose experts are MXFP4, packed by compressed-tensors; dense weights as transformers loads them."""
    import transformers

    pico_bases.gpt_oss(folder, 64)
    tensors: Dense = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value.bfloat16()
            continue
        packs = [_mxfp4(expert.T.contiguous().bfloat16()) for expert in value]
        blocks = torch.stack([pack["weight_packed"] for pack in packs])
        tensors[f"{name}_blocks"] = blocks.unflatten(-1, (-1, 16)).contiguous()
        tensors[f"{name}_scales"] = torch.stack([pack["weight_scale"] for pack in packs])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = config_of(folder) | {"dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with quiet():
        model: Any = transformers.GptOssForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.Mxfp4Config(dequantize=True),
            dtype=torch.bfloat16,
            device_map="cpu",
        )
    return folder, {name: value.detach().clone() for name, value in model.state_dict().items()}
