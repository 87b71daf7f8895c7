"""Pico models and adapters made by PEFT itself, for the tests of factors and reports."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_merge.verification.live_adapter import quiet_libraries

WORDS = ["<s>", "</s>", "<unk>", *(f"w{index}" for index in range(125))]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def pico_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama of two layers with a word tokenizer, saved to `folder`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with quiet_libraries():
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        model.to(dtype).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
    return folder


def load(folder: Path) -> nn.Module:
    """The model in `folder`, in its own dtype."""
    import transformers

    with quiet_libraries():
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


def peft_adapter(
    base: Path, folder: Path, *, rank: int = 4, noise: float = 0.02, update: float = 0.05, **settings: Any
) -> Path:
    """A PEFT adapter on `base`, with numbers as after a training: B away from zero, magnitudes moved by `noise`."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.add_(update * torch.randn_like(parameter))
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + noise * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def peft_model(base: Path, folder: Path) -> nn.Module:
    """`folder` loaded by PEFT onto `base`."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: nn.Module = peft.PeftModel.from_pretrained(load(base), str(folder))
    return loaded.eval()


def merged_weights(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """float64 weights by module name as PEFT's own merge makes them in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(base, folder).merge_and_unload()  # type: ignore[operator]
    return {name.removesuffix(".weight"): tensor.to(torch.float64) for name, tensor in model.state_dict().items()}


def base_weights(base: Path) -> dict[str, torch.Tensor]:
    """float64 weights of the base by module name."""
    return {name.removesuffix(".weight"): tensor.to(torch.float64) for name, tensor in load(base).state_dict().items()}


def dcft_adapter(base: Path, folder: Path, kernel: int = 4) -> Path:
    """A DCFT adapter in the safe folder format."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    folder.mkdir(parents=True)
    tensors = {}
    for name, weight in base_weights(base).items():
        if name.endswith(tuple(TARGETS)):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A"] = torch.randn(1, weight.shape[1] // kernel) * 0.1
            tensors[f"{prefix}.lora_B"] = torch.randn(weight.shape[0] // kernel, 1) * 0.1
            tensors[f"{prefix}.lora_C"] = torch.randn(1, 1, kernel, kernel)
            tensors[f"{prefix}.ranknum"] = torch.tensor([float(kernel)])
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "DCFT", "format_version": 1, "base_model_name_or_path": "org/pico", "task_type": "CAUSAL_LM",
        "target_modules": TARGETS, "r": 1, "kernel_size": [kernel, kernel], "stride": [kernel, kernel],
        "lora_alpha": 8.0, "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factor_products(folder: Path) -> dict[str, torch.Tensor]:
    """B A (out, in), float64, by module name, from a factor folder's files."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    return {
        name.removeprefix("base_model.model."): tensors[name + ends[1]].to(torch.float64)
        @ tensors[name + ends[0]].to(torch.float64)
        for name in names
    }
