"""Pico bases that the quantisation libraries themselves have quantised and saved, and their own dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pico_bases import quiet
from torch import Tensor, nn

PRESETS = ("FP8_BLOCK", "FP8_DYNAMIC", "W4A16")  # of compressed-tensors
KINDS = ("nf4", *PRESETS)
OTHER_PRESETS = ("FP8", "INT8", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16")


def llama(hidden: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A two-layer Llama with random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # so that logits are far from zero and errors would show
    return model.to(dtype).eval()


def quantised(
    kind: str, folder: Path, hidden: int = 256, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, dict[str, Tensor]]:
    """Save a quantised Llama in `folder`; return it, and the library's dequantised weights by tensor name."""
    with quiet():
        if kind == "nf4":
            return _nf4(folder, hidden, dtype)
        return _int8(folder, hidden, dtype) if kind == "int8" else _compressed(kind, folder, hidden, dtype)


def _int8(folder: Path, hidden: int, dtype: torch.dtype) -> tuple[Path, dict[str, Tensor]]:
    """Quantised by bitsandbytes' LLM.int8() through transformers."""
    import bitsandbytes as bnb
    import transformers

    plain = folder.with_name(folder.name + "-plain")
    llama(hidden, dtype).save_pretrained(plain)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        plain, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder)
    dense = {}
    for name, parameter in model.named_parameters():
        scale = getattr(parameter, "SCB", None)
        dense[name] = parameter.data if scale is None else bnb.functional.int8_vectorwise_dequant(parameter.data, scale)
    return folder, dense


def _nf4(folder: Path, hidden: int, dtype: torch.dtype) -> tuple[Path, dict[str, Tensor]]:
    """Quantised by bitsandbytes through transformers, with double quantisation."""
    import bitsandbytes as bnb
    import transformers

    plain = folder.with_name(folder.name + "-plain")
    llama(hidden, dtype).save_pretrained(plain)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder, max_shard_size="100kB")
    dense = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        dense[name] = parameter.data if state is None else bnb.functional.dequantize_4bit(parameter.data, state)
    return folder, dense


def _compressed(preset: str, folder: Path, hidden: int, dtype: torch.dtype) -> tuple[Path, dict[str, Tensor]]:
    """Quantised by compressed-tensors with one of its presets: scales from the largest values."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = llama(hidden, dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if preset.startswith(("W4", "W8")):
        scheme.weights.group_size = 64
    if preset == "FP8_BLOCK" and any(
        size % 128 for name, shape in shapes.items() if "_proj.w" in name for size in shape
    ):
        scheme.weights.block_structure = [64, 64]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            _calibrate(module)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(folder, max_shard_size="100kB")
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return folder, {name: model.get_parameter(name).data for name in shapes}


def _calibrate(module: Any) -> None:
    """Set the scales (and zero points) of one layer by compressed-tensors' own formulas."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = module.quantization_scheme.weights
    weight, overall = module.weight.data, None
    if arguments.strategy == "block":
        rows, columns = arguments.block_structure
        blocks = weight.reshape(weight.shape[0] // rows, rows, -1, columns)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif arguments.strategy in ("group", "tensor_group"):
        groups = weight.reshape(weight.shape[0], -1, arguments.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
    elif arguments.strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    else:
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if arguments.strategy == "tensor_group":
        overall = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data.copy_(overall)
    scale, zero = calculate_qparams(low, high, arguments, global_scale=overall)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if not arguments.symmetric:
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return content
