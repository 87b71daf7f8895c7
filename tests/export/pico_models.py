"""Pico models and adapters: two layers, random weights, a tokenizer of single bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 384


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
        "granite": (
            t.GraniteConfig,
            {
                "embedding_multiplier": 3.0,
                "logits_scaling": 0.5,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.2,
            },
        ),
        "smollm3": (t.SmolLM3Config, {"no_rope_layers": [1, 0]}),
        "gemma": (t.GemmaConfig, {"tie_word_embeddings": True}),
        "gemma2": (t.Gemma2Config, {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 32}),
        "gemma3": (
            t.Gemma3TextConfig,
            {
                "tie_word_embeddings": True,
                "query_pre_attn_scalar": 16,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
            },
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
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
            elif "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "lora_A" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
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


def add_dcft(model: Any, adapter: Path, config: dict[str, Any]) -> None:
    """Add a DCFT folder's dense delta to `model`: the reference's forward, written out."""
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


def save_encoder(
    folder: Path, family: str, task: str = "SequenceClassification", seed: int = 0, labels: int = 3, layers: int = 2
) -> Path:
    """A pico encoder (DeBERTa-v2 as v3 is configured) with a head of three labels, one bias all zeros, or another task.

    task "Model" is the body alone.
    """
    import transformers as t

    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 140,
        "num_labels": 2 if task == "QuestionAnswering" else labels,
    }
    if family == "distilbert":
        sizes = {"dim": 64, "hidden_dim": 96, "n_layers": layers, "n_heads": 4}
        options = {key: options[key] for key in ("vocab_size", "max_position_embeddings", "num_labels")} | sizes
    if family == "modernbert":
        options |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        options |= {"local_attention": 16, "global_attn_every_n_layers": 2}
    if family in ("roberta", "xlm-roberta"):
        options["type_vocab_size"] = 1
    if family == "deberta-v2":
        options |= {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 32,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "max_relative_positions": -1,
        }
    prefix = {
        "bert": "Bert",
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "mpnet": "MPNet",
        "distilbert": "DistilBert",
        "modernbert": "ModernBert",
        "deberta-v2": "DebertaV2",
    }[family]
    name = prefix + (task if task == "Model" else f"For{task}")
    model = getattr(t, name)(getattr(t, f"{prefix}Config")(**options))
    _enliven(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("classifier") and name.endswith("bias"):
                parameter.zero_()  # a fresh head: exporters like to drop it
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_gpt2(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """A pico GPT-2: Conv1D weights are (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=layers,
            n_head=4,
            n_positions=128,
            bos_token_id=256,
            eos_token_id=257,
        )
    )
    _enliven(model, seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _enliven(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def save_encoder_adapter(base: Path, folder: Path, seed: int, trained_as: str | None = None, **options: Any) -> Path:
    """A PEFT adapter on every attention and feed-forward linear of an encoder, with a trained head where it has one.

    trained_as: another class of transformers than the base's own.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    (own,) = json.loads((base / "config.json").read_text())["architectures"]
    model = getattr(transformers, trained_as or own).from_pretrained(base)
    linear = rf".*layers?\.\d+\..*({'|'.join(ENCODER_LINEARS)})"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": linear, "task_type": "SEQ_CLS", **options}
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + 0.05 * noise) if "magnitude" in name else parameter + 0.1 * noise)
    model.save_pretrained(folder)
    return folder


def save_encoder_dcft(base: Path, folder: Path, seed: int, kernel: int = 8) -> Path:
    """A DCFT checkpoint as the reference code writes it: a pickled state dict with lora_* beside every weight.

    `folder`/merged holds the dense model, computed here from the reference's forward.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    generator = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    dense = dict(state)
    alpha = 16.0
    for name, weight in list(state.items()):
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if ".layer." not in name or weight.ndim != 2 or last not in DCFT_MODULES:
            if not name.startswith(("classifier", "pooler")) or weight.ndim == 0:
                continue
            state[name] = dense[name] = weight + torch.randn(weight.shape, generator=generator) * 0.2
            continue
        out, inner = weight.shape
        a = torch.randn(1, inner // kernel, generator=generator) * 0.3
        b = torch.randn(out // kernel, 1, generator=generator) * 0.3
        c = torch.randn(1, 1, kernel, kernel, generator=generator) * 0.1
        number = torch.tensor([8.0])
        state |= {f"{module}.lora_A": a, f"{module}.lora_B": b, f"{module}.lora_C": c, f"{module}.ranknum": number}
        delta = torch.nn.functional.conv_transpose2d((a.T @ b.T)[None, None], c, stride=kernel)[0, 0]
        dense[name] = weight + delta.T * alpha / (number + 1e-5)
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((base / "config.json").read_text())
    config |= {"apply_lora": True, "lora_type": "svd", "lora_module": "all", "lora_alpha": alpha, "lora_r": 1}
    (folder / "config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {}
    if config.get("share_att_key"):  # the authors' positional queries are of the frozen weight, the keys adapted
        settings["share_att_key"] = False
        for name in [name for name in state if name.startswith(tuple(_attentions(state)))]:
            kept = state if ".query_proj." in name else dense
            if name.endswith(("_proj.weight", "_proj.bias")) and ".value_proj." not in name:
                dense[name.replace(".self.", ".self.pos_")] = kept[name]
    model = AutoModelForSequenceClassification.from_pretrained(base, **settings)
    model.load_state_dict(dense)
    model.save_pretrained(folder / "merged")
    return folder


def _attentions(state: dict[str, Any]) -> list[str]:
    return [name.removesuffix("query_proj.weight") for name in state if name.endswith("query_proj.weight")]


ENCODER_LINEARS = (
    *("query", "key", "value", "query_proj", "key_proj", "value_proj", "dense"),
    *("q", "k", "v", "o", "q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2", "Wqkv", "Wo", "Wi"),
)  # fmt: skip
DCFT_MODULES = ("query", "key", "value", "query_proj", "key_proj", "value_proj", "dense")
