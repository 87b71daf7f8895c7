"""Tiny random models and adapters with their merged weights by the plain formulas, in float64.

Nothing here uses the package: the formulas are those of the papers and of PEFT, written out, so that the
tests have an oracle of their own. `Adapter.folder` is what a server loads, `Adapter.merged` what it must
compute.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, VOCAB = 256, 4, 2, 64, 512, 2, 512
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)


@dataclass
class Adapter:
    """One trained adapter: `merged` holds its weights by base tensor name, float64.

    `folder` holds it as factors, ready for vLLM; `raw` as its training would have saved it.
    """

    name: str
    folder: Path
    merged: dict[str, Tensor] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        return self.folder.with_name(self.folder.name + "-raw")

    def write_raw(self, tensors: dict[str, Tensor], **config: Any) -> None:
        self.raw.mkdir()
        named = {f"base_model.model.{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(named, self.raw / "adapter_model.safetensors")
        targets = sorted({name.split(".")[4] for name in tensors})
        config = {"base_model_name_or_path": None, "target_modules": targets, **config}
        (self.raw / "adapter_config.json").write_text(json.dumps(config))


def make_base(folder: Path, family: str, seed: int = 0) -> Path:
    """A random float32 Qwen2 (q, k and v with biases) or Llama; the logits are spread enough to differ."""
    import transformers

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen2":
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(head_dim=HEAD_DIM, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes with a chat template, enough for a server to start; tests compare token ids."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def base_weights(base: Path) -> dict[str, Tensor]:
    """Every tensor of the base, float64."""
    return {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}


def module_names(targets: tuple[str, ...], layers: int = LAYERS) -> list[str]:
    return [
        f"model.layers.{layer}.{'self_attn' if target in ATTENTION else 'mlp'}.{target}"
        for layer in range(layers)
        for target in targets
    ]


def write_folder(
    folder: Path,
    factors: dict[str, tuple[Tensor, Tensor]],
    scales: dict[str, tuple[Tensor, Tensor]] | None = None,
    **config: Any,
) -> None:
    """A factor folder: factors are (down, up) and scales (magnitude, row_scale) by module."""
    folder.mkdir(parents=True)
    tensors = {}
    rank = max(down.shape[0] for down, _ in factors.values())
    ranks = {name: down.shape[0] for name, (down, _) in factors.items() if down.shape[0] != rank}
    for name, (down, up) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.float().contiguous()
    row_scales = {}
    for name, (magnitude, row_scale) in (scales or {}).items():
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude.float()
        row_scales[f"base_model.model.{name}.row_scale"] = row_scale.float()
    save_file(tensors, folder / "adapter_model.safetensors")
    if row_scales:
        save_file(row_scales, folder / "row_scale.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_modules": sorted({name.rsplit(".", 1)[1] for name in factors}),
                "rank_pattern": ranks,
                "alpha_pattern": ranks,
                "init_lora_weights": True,
                "use_dora": bool(row_scales),
                "bias": "none",
                "base_model_name_or_path": None,
                **config,
            }
        )
    )
    (folder / "adapter_merge.json").write_text(json.dumps({"artefact": "factors"}))


Maker = Callable[[str, Path, dict[str, Tensor], torch.Generator, tuple[str, ...]], Adapter]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_lora(
    name: str,
    folder: Path,
    base: dict[str, Tensor],
    generator: torch.Generator,
    targets: tuple[str, ...] = ALL,
) -> Adapter:
    """W' = W0 + (alpha / r) B A, saved as a PEFT folder of rank 8 with alpha 16."""
    adapter = Adapter(name, folder)
    factors = {}
    for module in module_names(targets):
        weight = base[module + ".weight"]
        a = normal(generator, 8, weight.shape[1]) / weight.shape[1] ** 0.5
        b = normal(generator, weight.shape[0], 8) * 0.1
        factors[module] = (a, b)
        adapter.merged[module + ".weight"] = weight + 16 / 8 * (b.float().double() @ a.float().double())
    write_folder(folder, factors, lora_alpha=16)
    (folder / "adapter_merge.json").unlink()
    shutil.copytree(folder, adapter.raw)
    return adapter


def make_dcft(
    name: str,
    folder: Path,
    base: dict[str, Tensor],
    generator: torch.Generator,
    targets: tuple[str, ...] = ALL,
) -> Adapter:
    """W' = W0 + (conv_transpose2d(lora_A^T lora_B^T, C, stride 8))^T alpha / (ranknum + 1e-5): DCFT."""
    adapter = Adapter(name, folder)
    factors = {}
    raw: dict[str, Tensor] = {}
    scale = 32.0 / (8 + 1e-5)
    for module in module_names(targets):
        weight = base[module + ".weight"]
        out, inner = weight.shape
        a = normal(generator, 1, inner // 8) * 0.2
        b = normal(generator, out // 8, 1) * 0.2
        c = normal(generator, 8, 8) * 0.2
        small = (a.T @ b.T)[None, None]
        raw |= {f"{module}.lora_A": a, f"{module}.lora_B": b, f"{module}.lora_C": c[None, None]}
        raw[f"{module}.ranknum"] = torch.tensor([8.0])
        delta = torch.nn.functional.conv_transpose2d(small, c[None, None], stride=8)[0, 0]
        adapter.merged[module + ".weight"] = weight + delta.T * scale
        left, values, right = torch.linalg.svd(c)
        factors[module] = (
            torch.kron(a, (left * values.sqrt()).T.contiguous()),
            scale * torch.kron(b, (right.T * values.sqrt()).contiguous()),
        )
    write_folder(folder, factors)
    shape: dict[str, Any] = {"kernel_size": [8, 8], "stride": [8, 8], "lora_alpha": 32.0, "r": 1}
    adapter.write_raw(raw, peft_type="DCFT", format_version=1, **shape)
    return adapter


def make_dora(
    name: str,
    folder: Path,
    base: dict[str, Tensor],
    generator: torch.Generator,
    targets: tuple[str, ...] = ALL,
) -> Adapter:
    """W' = m / ||W0 + s B A|| (W0 + s B A), norms per output row (DoRA eq. 5 as PEFT computes it)."""
    return _scaled(name, folder, base, generator, targets, dude=False)


def make_dude(
    name: str,
    folder: Path,
    base: dict[str, Tensor],
    generator: torch.Generator,
    targets: tuple[str, ...] = ALL,
) -> Adapter:
    """W' = m / ||V|| V with V = W0 + s (B A - B0 A0); B0, A0 are W0's leading singular triplets: DuDe."""
    return _scaled(name, folder, base, generator, targets, dude=True)


def _scaled(
    name: str,
    folder: Path,
    base: dict[str, Tensor],
    generator: torch.Generator,
    targets: tuple[str, ...],
    dude: bool,
) -> Adapter:
    adapter = Adapter(name, folder)
    factors, scales = {}, {}
    raw: dict[str, Tensor] = {}
    s = 2.0
    for module in module_names(targets):
        weight = base[module + ".weight"]
        a = normal(generator, 8, weight.shape[1]) / weight.shape[1] ** 0.5
        b = normal(generator, weight.shape[0], 8) * 0.1
        down, up = a, s * b
        direction = weight + s * b @ a
        if dude:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            b0 = left[:, :8] * (values[:8] / s).sqrt()
            a0 = (values[:8] / s).sqrt()[:, None] * right[:8]
            a, b = a0 + 0.1 * a, b0 + 0.1 * b
            down, up = torch.cat((a, a0)), s * torch.cat((b, -b0), dim=1)
            direction = weight + s * (b @ a - b0 @ a0)
            raw |= {f"{module}.lora_A_init.weight": a0, f"{module}.lora_B_init.weight": b0}
        norm = direction.norm(dim=1)
        magnitude = weight.norm(dim=1) * (1 + 0.05 * normal(generator, weight.shape[0]))
        adapter.merged[module + ".weight"] = (magnitude / norm)[:, None] * direction
        factors[module] = (down, up)
        scales[module] = (magnitude, magnitude / norm)
        raw |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        raw[f"{module}.lora_magnitude_vector"] = magnitude
    write_folder(folder, factors, scales)
    if dude:
        shape: dict[str, Any] = {"base": "original", "residual_dtype": "float32", "use_rslora": False}
        adapter.write_raw(raw, peft_type="DUDE", format_version=1, r=8, lora_alpha=16, **shape)
    else:
        adapter.write_raw(raw, peft_type="LORA", r=8, lora_alpha=16, use_dora=True, init_lora_weights=True)
    return adapter


MAKERS: dict[str, Maker] = {"lora": make_lora, "dcft": make_dcft, "dora": make_dora, "dude": make_dude}
