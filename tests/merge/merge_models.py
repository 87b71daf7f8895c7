"""Small sharded checkpoints and adapters for the engine's tests, and the merge formula in float64."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = {"q_proj": (96, 64), "k_proj": (32, 64), "up_proj": (200, 64), "down_proj": (64, 200)}
RANK = 4


def base_tensors(layers: int = 3, dtype: torch.dtype = torch.bfloat16, factor: int = 1) -> dict[str, Tensor]:
    """A decoder-like set of weights; `factor` makes every side of a linear that many times larger."""
    generator = torch.Generator().manual_seed(0)
    hidden = 64 * factor
    found = {"model.embed_tokens.weight": (torch.randn(50, hidden, generator=generator) * 0.1).to(dtype)}
    for layer in range(layers):
        for name, (out, inner) in SHAPES.items():
            weight = torch.randn(out * factor, inner * factor, generator=generator) * 0.1
            found[f"model.layers.{layer}.{name}.weight"] = weight.to(dtype)
        found[f"model.layers.{layer}.norm.weight"] = torch.ones(hidden, dtype=dtype)
    found["model.norm.weight"] = torch.ones(hidden + 1, dtype=dtype)  # an odd size: what follows is not aligned
    found["lm_head.weight"] = (torch.randn(50, hidden, generator=generator) * 0.1).to(dtype)
    found["model.counter"] = torch.arange(5)
    return found


def write_base(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 3, config: Mapping[str, object] | None = None
) -> Path:
    """A checkpoint folder as transformers would write it, with side files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[number::shards] for number in range(shards)] if shards > 1 else [names]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(
            config or {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        )
    )
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_own.py", "README.md"):
        (folder / name).write_text(f"{name} of the base")
    (folder / "templates").mkdir()
    (folder / "templates" / "tool.txt").write_text("nested")
    return folder


def write_lora(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dora: bool = False,
    alpha: float = 8.0,
    only: str = "layers.",
    scale: float = 0.1,
    extra: Mapping[str, Tensor] | None = None,
    config: Mapping[str, object] | None = None,
) -> Path:
    """A PEFT LoRA or DoRA folder on every linear whose name holds `only`."""
    generator = torch.Generator().manual_seed(1)
    content: dict[str, Tensor] = {}
    modules = [name for name in tensors if only in name and name.split(".")[-2] in (*SHAPES, "embed_tokens", "lm_head")]
    for name in modules:
        module = name.removesuffix(".weight")
        out, inner = tensors[name].shape
        key = f"base_model.model.{module}"
        content[f"{key}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * scale
        content[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * scale
        if dora:
            norms = torch.linalg.vector_norm(tensors[name].float(), dim=1)
            moved = 1 + 0.01 * torch.randn(out, generator=generator)  # as training moves them
            content[f"{key}.lora_magnitude_vector"] = norms * moved
    folder.mkdir(parents=True)
    save_file({**content, **(extra or {})}, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in modules})
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "use_dora": dora, "bias": "none",
                "fan_in_fan_out": False, "init_lora_weights": True, "target_modules": targets,
                "base_model_name_or_path": "base", "task_type": "CAUSAL_LM", **(config or {}),
            }
        )
    )  # fmt: skip
    return folder


def write_four_shards(folder: Path) -> tuple[Path, Path]:
    """A base in four shards and an adapter that leaves the last one alone."""
    tensors = base_tensors()
    untouched = {name: tensors.pop(name) for name in ("model.embed_tokens.weight", "lm_head.weight", "model.counter")}
    base = write_base(folder / "base", tensors | untouched, 1)
    (base / "model.safetensors").unlink()
    split = dict(tensors)
    parts = [dict(list(split.items())[number::3]) for number in range(3)] + [untouched]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00004.safetensors"
        save_file(part, base / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base, write_lora(folder / "adapter", tensors)


def expected(tensors: Mapping[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """W' of every adapted weight in float64: W0 + s B A, its rows scaled to the magnitude where there is one."""
    content = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for key, a in content.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        name = module.removeprefix("base_model.model.") + ".weight"
        scale = config["lora_alpha"] / config["r"]
        weight = tensors[name].double() + scale * content[f"{module}.lora_B.weight"].double() @ a.double()
        magnitude = content.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None:
            weight *= (magnitude.double() / weight.norm(dim=1))[:, None]
        found[name] = weight
    return found


def read_model(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by safetensors' own loader."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def shard_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every weight file in `folder` itself."""
    return {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}
