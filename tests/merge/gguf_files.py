"""GGUF files of pico models, written with the gguf package as llama.cpp's convert_hf_to_gguf.py lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Kind = gguf.GGMLQuantizationType
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 64, **TOKENS,
}  # fmt: skip
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}  # float16


def pico(architecture: str, tied: bool = False, **settings: Any) -> Any:
    """A model of two layers with random weights."""
    import transformers as t

    torch.manual_seed(0)
    values = {**SIZES, "tie_word_embeddings": tied, **settings}
    config: Any = {
        "llama": t.LlamaConfig,
        "qwen2": t.Qwen2Config,
        "qwen3": t.Qwen3Config,
        "gemma2": t.Gemma2Config,
    }[architecture](**values)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def metadata(architecture: str, config: Any) -> dict[str, tuple[str, Any]]:
    """Metadata key -> (method of GGUFWriter, value)."""
    stated = {
        "block_count": ("uint32", config.num_hidden_layers),
        "context_length": ("uint32", config.max_position_embeddings),
        "embedding_length": ("uint32", config.hidden_size),
        "feed_forward_length": ("uint32", config.intermediate_size),
        "attention.head_count": ("uint32", config.num_attention_heads),
        "attention.head_count_kv": ("uint32", config.num_key_value_heads),
        "attention.key_length": ("uint32", config.head_dim),
        "attention.layer_norm_rms_epsilon": ("float32", config.rms_norm_eps),
        "rope.freq_base": ("float32", 10000.0),
        "vocab_size": ("uint32", config.vocab_size),
    }
    if architecture == "gemma2":
        stated |= {
            "attention.sliding_window": ("uint32", config.sliding_window),
            "attn_logit_softcapping": ("float32", config.attn_logit_softcapping),
            "final_logit_softcapping": ("float32", config.final_logit_softcapping),
        }
    keys = {f"{architecture}.{key}": value for key, value in stated.items()}
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    return keys | {f"tokenizer.ggml.{name}_token_id": ("uint32", value) for name, value in ids.items()}


def converted(name: str, values: np.ndarray[Any, Any], architecture: str, config: Any) -> np.ndarray[Any, Any]:
    """What the converter does to a tensor's values (LlamaModel.permute, Gemma2Model.modify_tensors)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture == "llama" and heads is not None:
        rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
    return values + 1 if architecture == "gemma2" and name.endswith("norm.weight") else values


def blocks(kind: Kind, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Random blocks of a type that the gguf package cannot quantise to, with small scales."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (shape[0] * shape[1] // size, nbytes), dtype=np.uint8)
    for start in SCALES[kind.name]:
        scale = random.uniform(0.0005, 0.002, (raw.shape[0], 1)).astype(np.float16)
        raw[:, start : start + 2] = scale.view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(
    file: Path,
    model: Any,
    architecture: str,
    kind: Kind = Kind.F32,
    keys: Mapping[str, tuple[str, Any] | None] = {},
    tensors: Mapping[str, np.ndarray[Any, Any] | None] = {},
    kinds: Mapping[str, Kind] = {},
) -> Path:
    """Write the model: matrices as `kind`, vectors as they are; `keys` and `tensors` are added, or None: left out.

    `kinds` are the types of tensors whose names hold the key, in the place of `kind`.
    """
    config, default = model.config, kind
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    for key, entry in {**metadata(architecture, config), **keys}.items():
        if entry is not None:
            getattr(writer, f"add_{entry[0]}")(key, entry[1])
    content: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        content[stored] = converted(stored, tensor.to(torch.float32).numpy(), architecture, config)
    content |= {name: values for name, values in tensors.items() if values is not None}
    for number, (name, values) in enumerate(content.items()):
        if name in tensors and tensors[name] is None:
            continue
        kind = next((other for part, other in kinds.items() if part in name), default)
        if values.ndim == 1 or name in tensors:
            writer.add_tensor(name, values)
        elif kind.name in SCALES:
            writer.add_tensor(name, blocks(kind, values.shape, number), raw_dtype=kind)
        elif kind in (Kind.F32, Kind.F16):
            writer.add_tensor(name, values.astype(np.float16 if kind == Kind.F16 else np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
