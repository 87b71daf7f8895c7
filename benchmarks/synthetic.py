"""Checkpoints and adapters of real models' shapes with random weights: for timing, not for use.

The shapes: "0.1b" (SmolLM2-135M's), "1.1b" (TinyLlama-1.1B's), "8b" and "70b" (Llama-3's); bf16, in shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from adapter_merge.storage.safetensors_header import layout
from adapter_merge.storage.tensor_io import raw_bytes, write_safetensors


class Size(NamedTuple):
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    shards: int


SIZES = {
    "0.1b": Size(576, 30, 1536, 9, 3, 49152, 3),
    "1.1b": Size(2048, 22, 5632, 32, 4, 32000, 3),
    "8b": Size(4096, 32, 14336, 32, 8, 128256, 4),
    "8b-2-layers": Size(4096, 2, 14336, 32, 8, 32000, 2),  # weights of the 8B's shapes, on a small disk
    "70b": Size(8192, 80, 28672, 64, 8, 128256, 30),
}
METHODS = ("lora", "dora", "dude", "dcft")
SCALE = 0.02
RANK = 16
KERNEL = 8


def linears(size: Size) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear of the decoder layers: module name and (out, in)."""
    kv = size.hidden // size.heads * size.kv_heads
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj", (size.hidden, size.hidden)
        yield f"{prefix}.self_attn.k_proj", (kv, size.hidden)
        yield f"{prefix}.self_attn.v_proj", (kv, size.hidden)
        yield f"{prefix}.self_attn.o_proj", (size.hidden, size.hidden)
        yield f"{prefix}.mlp.gate_proj", (size.intermediate, size.hidden)
        yield f"{prefix}.mlp.up_proj", (size.intermediate, size.hidden)
        yield f"{prefix}.mlp.down_proj", (size.hidden, size.intermediate)


def tensors(size: Size) -> list[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of the checkpoint: name, dtype, shape."""
    found: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", "BF16", (size.vocabulary, size.hidden))
    ]
    found += [(f"{name}.weight", "BF16", shape) for name, shape in linears(size)]
    for layer in range(size.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append((f"model.layers.{layer}.{norm}.weight", "BF16", (size.hidden,)))
    found.append(("model.norm.weight", "BF16", (size.hidden,)))
    found.append(("lm_head.weight", "BF16", (size.vocabulary, size.hidden)))
    return found


def write_checkpoint(folder: Path, name: str, *, sparse: bool = False) -> None:
    """The base model, once; shards of about the same size. sparse: zeros that take no room on the disk."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = SIZES[name]
    found = tensors(size)
    total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _, _, shape in found)
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    held = 0
    for tensor in found:
        if held > total / size.shards and len(shards) < size.shards:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += torch.Size(tensor[2]).numel()
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * SCALE).bfloat16()
    weight_map = {}
    for number, content in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head, refs = layout(file, content, {"format": "pt"})
        with file.open("wb") as stream:
            stream.write(head)
            for ref in refs:
                weight_map[ref.name] = file.name
                if sparse:
                    continue
                left, shift = ref.nbytes // 2, len(weight_map) * 4099
                while left:
                    piece = noise[shift % (1 << 23) :][: min(left, 1 << 23)]
                    stream.write(raw_bytes(piece))
                    left -= piece.numel()
                    shift += 7919
            stream.truncate(refs[-1].stop)
    index = {"metadata": {"total_size": total * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "vocab_size": size.vocabulary,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, name: str, method: str) -> None:
    """An adapter on every linear, once. dude: on the residual base, as a trained file says it (no SVD to redo)."""
    if (folder / "adapter_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * SCALE

    content: dict[str, torch.Tensor] = {}
    for module, (out, inner) in linears(SIZES[name]):
        key = f"base_model.model.{module}"
        if method == "dcft":
            content[f"{key}.lora_A"] = draw(1, inner // KERNEL)
            content[f"{key}.lora_B"] = draw(out // KERNEL, 1)
            content[f"{key}.lora_C"] = draw(1, 1, KERNEL, KERNEL)
            content[f"{key}.ranknum"] = torch.ones(1)
            continue
        content[f"{key}.lora_A.weight"] = draw(RANK, inner)
        content[f"{key}.lora_B.weight"] = draw(out, RANK)
        if method in ("dora", "dude"):
            content[f"{key}.lora_magnitude_vector"] = 1 + draw(out)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    common = {"base_model_name_or_path": None, "task_type": "CAUSAL_LM", "target_modules": targets}
    if method == "dcft":
        config = {"peft_type": "DCFT", "format_version": 1, "r": 1, "kernel_size": [KERNEL] * 2,
                  "stride": [KERNEL] * 2, "lora_alpha": 32.0, "modules_to_save": None, **common}  # fmt: skip
    elif method == "dude":
        config = {"peft_type": "DUDE", "format_version": 1, "r": RANK, "lora_alpha": 32, "use_rslora": False,
                  "base": "residual", "residual_dtype": "bfloat16", **common}  # fmt: skip
    else:
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "use_dora": method == "dora", "bias": "none",
                  "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True, **common}  # fmt: skip
    write_safetensors(folder / "adapter_model.safetensors", content, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
