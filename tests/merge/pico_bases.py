"""Pico models and adapters with random values in every trained tensor, and the oracle: PEFT's live forward."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3, 30, 31], [4, 4, 8, 6, 0, 2, 1, 29]])


def llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, bias: bool = False) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
    )
    return save(LlamaForCausalLM, config, folder, dtype)


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    return save(GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64), folder)


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return save(MixtralForCausalLM, config, folder)


def qwen3_moe(folder: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return save(Qwen3MoeForCausalLM, config, folder)


def gpt_oss(folder: Path, intermediate: int = 24) -> Path:
    """Experts as (experts, in, out), gate and up interleaved, with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=32,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    return save(GptOssForCausalLM, config, folder)


def llama4(folder: Path, intermediate: int = 24) -> Path:
    """Experts as (experts, in, out), gate before up; a shared expert beside them."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=32,
        intermediate_size=intermediate,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save(Llama4ForCausalLM, config, folder)


def save(kind: Any, config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@contextlib.contextmanager
def quiet() -> Any:
    """PEFT and transformers warn and print about what is meant here."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def randomise(model: nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Move every trained tensor away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)


def train(base: Path, config: Any, folder: Path, *, seed: int = 1, scale: float = 0.1, before: Any = None) -> Any:
    """A PEFT adapter on `base` with random values, saved to `folder`; the live model."""
    from peft import get_peft_model

    with quiet():
        model = load(base)
        if before is not None:
            before(model)
        peft = get_peft_model(model, config)
        randomise(peft, scale, seed)
        peft.eval()
        peft.save_pretrained(folder)
    return peft


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), quiet():
        return model(TOKENS).logits


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())
