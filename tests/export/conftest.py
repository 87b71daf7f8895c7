"""Pico models and adapters for the ONNX tests: two layers, random weights, a byte-level tokenizer.

Warnings of other packages, each as narrow as it goes, are ignored in `pytest_collection_modifyitems`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 384
IGNORED: tuple[str, ...] = (
    # PEFT 0.21 asks transformers 5.23 by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            for pattern in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(pattern))


def pico_config(kind: str, **changes: Any) -> Any:
    """A transformers config of two small layers with every feature that the family has."""
    import transformers as t

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "tie_word_embeddings": False,
    }
    classes = {
        "llama": (t.LlamaConfig, {}),
        "mistral": (t.MistralConfig, {"sliding_window": None}),
        "mistral-window": (t.MistralConfig, {"sliding_window": 32}),
        "qwen2": (t.Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (t.Qwen3Config, {}),
        "phi3": (t.Phi3Config, {"original_max_position_embeddings": 512}),
        "gemma": (t.GemmaConfig, {"tie_word_embeddings": True}),
        "gemma2": (t.Gemma2Config, {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 32}),
        "gemma3": (
            t.Gemma3TextConfig,
            {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 32},
        ),
    }
    cls, special = classes[kind]
    options = {**common, **special, **changes}
    if kind == "phi3":
        del options["head_dim"]
    return cls(**options)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes with a chat template, as transformers writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    fast.save_pretrained(folder)


def save_pico(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """A pico model of `kind` with lively random weights (and biases, where it has them) in `folder`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(pico_config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 2:
                parameter.normal_(0, 1.2 / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.bos_token_id = 256
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_lora(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A PEFT adapter with random trained-looking factors on `base`; PEFT writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "lora_A" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def save_dcft(base: Path, folder: Path, seed: int, modules: tuple[str, ...], kernel: int = 4) -> Path:
    """A DCFT adapter in the project's own safe folder form, on the linears that end in `modules`."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and weight.ndim == 2 and module.endswith(modules):
            out, inner = weight.shape
            prefix = f"base_model.model.{module}."
            tensors[prefix + "lora_A"] = torch.randn(1, inner // kernel, generator=generator) * 0.3
            tensors[prefix + "lora_B"] = torch.randn(out // kernel, 1, generator=generator) * 0.3
            tensors[prefix + "lora_C"] = torch.randn(1, 1, kernel, kernel, generator=generator) * 0.1
            tensors[prefix + "ranknum"] = torch.tensor([8.0])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "DCFT",
        "format_version": 1,
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "target_modules": list(modules),
        "r": 1,
        "kernel_size": [kernel, kernel],
        "stride": [kernel, kernel],
        "lora_alpha": 16.0,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama."""
    return save_pico(tmp_path_factory.mktemp("pico") / "llama", "llama")


@pytest.fixture(scope="session")
def adapters(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of every kind on `pico`, with different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return {
        "lora": save_lora(pico, root / "lora", 1, target_modules=["q_proj", "v_proj", "down_proj"]),
        "rslora": save_lora(pico, root / "rslora", 2, use_rslora=True, rank_pattern={"k_proj": 2, "up_proj": 7}),
        "dora": save_lora(pico, root / "dora", 3, use_dora=True, target_modules=attention),
        "dude": save_lora(pico, root / "dude", 4, use_dora=True, init_lora_weights="pissa"),
        "dcft": save_dcft(pico, root / "dcft", 5, ("q_proj", "k_proj", "gate_proj", "down_proj")),
    }


@pytest.fixture(scope="session")
def reference() -> Callable[[Path, Path | None, list[int]], torch.Tensor]:
    """Logits (positions, vocabulary) in float64 of a base, or of a base with an adapter, without our code.

    PEFT runs what PEFT knows; DCFT is the reference's forward, written out.
    """

    def run(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        if adapter is not None:
            config = json.loads((adapter / "adapter_config.json").read_text())
            if config["peft_type"] == "DCFT":
                _add_dcft(model, adapter, config)
            else:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model = model.double().eval()
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return logits

    return run


def _add_dcft(model: Any, adapter: Path, config: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    for key in tensors:
        if not key.endswith(".lora_A"):
            continue
        prefix = key.removesuffix("lora_A")
        product = tensors[prefix + "lora_A"].T @ tensors[prefix + "lora_B"].T  # (in/k, out/k)
        delta = torch.nn.functional.conv_transpose2d(
            product[None, None].double(), tensors[prefix + "lora_C"].double(), stride=config["stride"][0]
        )[0, 0]
        scale = config["lora_alpha"] / (tensors[prefix + "ranknum"].item() + 1e-5)
        weight = model.get_submodule(prefix.removeprefix("base_model.model.").rstrip(".")).weight
        with torch.no_grad():
            weight += (delta.T * scale).float()
