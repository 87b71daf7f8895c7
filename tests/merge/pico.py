"""Pico models and adapters of every kind, and the DCFT layer written from its formula: the tests' independent truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ARCHITECTURES = ("llama", "qwen2", "gpt2", "bert", "roberta", "deberta")
CLASSIFIERS = ("bert", "roberta", "deberta")
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dude": {"init_lora_weights": "pissa", "use_dora": True},
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "roberta": ["query", "key", "value", "intermediate.dense"],
    "deberta": ["query_proj", "key_proj", "value_proj", "intermediate.dense"],
}
VOCABULARY = 120


def pico_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A two-layer model of 48 x 96 with random weights and biases, in eval mode."""
    import transformers as t

    torch.manual_seed(seed)
    decoder = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "vocab_size": VOCABULARY, "max_position_embeddings": 64}  # fmt: skip
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        model: Any = t.LlamaForCausalLM(t.LlamaConfig(**decoder, **tokens, num_key_value_heads=2))
    elif kind == "qwen2":
        config = t.Qwen2Config(**decoder, **tokens, num_key_value_heads=2, tie_word_embeddings=True)
        model = t.Qwen2ForCausalLM(config)
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=48, n_inner=96, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **tokens)
        )
    elif kind == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**decoder, num_labels=3))
    elif kind == "roberta":
        model = t.RobertaForSequenceClassification(t.RobertaConfig(**decoder, num_labels=3, pad_token_id=1))
    else:
        config = t.DebertaV2Config(
            **decoder, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
            position_buckets=8, norm_rel_ebd="layer_norm", position_biased_input=False, pooler_hidden_size=48,
        )  # fmt: skip
        model = t.DebertaV2ForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(3)  # so that logits are far from zero and errors would show
    return model.to(dtype).eval()


def tokens() -> Tensor:
    """(3, 17) token ids without padding."""
    return torch.randint(5, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = tokens()
    out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out.float()


def save_base(model: Any, folder: Path, shard: str = "40kB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def peft_adapter(model: Any, kind: str, folder: Path, noise: float = 0.03, **config: Any) -> Any:
    """Wrap `model`, move every trained tensor as training would, save to `folder`; returns the live PEFT model."""
    import peft

    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], **config}
    if kind in CLASSIFIERS:
        settings.setdefault("task_type", "SEQ_CLS")
    torch.manual_seed(1)
    live = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    live.save_pretrained(folder)
    return live.eval()


class DcftLinear(nn.Module):
    """y = x W0^T + b + (x conv_transpose2d(A^T B^T, C)) alpha / (ranknum + 1e-5), as arXiv 2503.01419 has it."""

    def __init__(
        self, plain: nn.Module, kernel: tuple[int, int], rank: int, alpha: float, stride: tuple[int, int]
    ) -> None:
        super().__init__()
        out, inner = plain.weight.shape
        self.plain, self.alpha, self.stride = plain, alpha, stride
        steps = (inner - kernel[0]) // stride[0] + 1, (out - kernel[1]) // stride[1] + 1
        self.lora_A = nn.Parameter(torch.randn(rank, steps[0]))
        self.lora_B = nn.Parameter(torch.randn(steps[1], rank))
        self.lora_C = nn.Parameter(0.02 * torch.randn(1, 1, *kernel))
        self.ranknum = nn.Parameter(torch.tensor([4.0]), requires_grad=False)

    def delta(self) -> Tensor:
        """(in, out)"""
        image = self.lora_A.T @ self.lora_B.T
        dense = nn.functional.conv_transpose2d(image[None, None], self.lora_C, stride=self.stride)[0, 0]
        return dense * self.alpha / (self.ranknum + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + x @ self.delta()


def dcft_model(
    kind: str,
    kernel: tuple[int, int] = (8, 8),
    rank: int = 1,
    alpha: float = 32.0,
    stride: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A pico model with every target linear replaced by a DcftLinear."""
    model = pico_model(kind, dtype)
    torch.manual_seed(2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in TARGETS[kind]):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DcftLinear(module, kernel, rank, alpha, stride or kernel))
    return model.to(dtype).eval()


def save_dcft_checkpoint(model: Any, folder: Path, alpha: float | None = 32.0, drop: str | None = None) -> Path:
    """The reference's form: one pickled state dict, base and adapter together, alpha in config.json alone."""
    folder.mkdir(parents=True)
    state = {name.replace(".plain.", "."): tensor.clone() for name, tensor in model.state_dict().items()}
    if drop:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(drop)}
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "apply_lora": True, "lora_type": "svd", "lora_r": 4,
               "lora_module": "query,key,value"}  # fmt: skip
    if alpha is not None:
        config["lora_alpha"] = alpha
    (folder / "config.json").write_text(json.dumps(config))
    return folder
