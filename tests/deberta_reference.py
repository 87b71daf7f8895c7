"""DCFT on DeBERTa-v2 and v3 as its authors run it, written from their formulas: what every artefact is held against.

github Godz-z/DCFT, commit 38f71d2: class SVDLinear (loralib/adalora.py) and class DisentangledSelfAttention
(NLU/src/transformers/models/deberta_v2/modeling_deberta_v2.py), unmerged. Everything around them is transformers'.

    SVDLinear(x)   x W^T + b + (x conv_transpose2d(A^T B^T, C)) alpha / (ranknum + 1e-5)
    score[i, j]    (q_i . k_j + q_i . kr[d(i, j)] + k_j . qr[d'(i, j)]) / sqrt(size * terms)
    share_att_key  kr = SVDLinear_key(r),  qr = nn.Linear.forward(query, r): the frozen weight; r: relative embeddings
    otherwise      kr = pos_key_proj(r),   qr = pos_query_proj(r): plain linears of their own, never adapted
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 120
TARGETS = ("query_proj", "key_proj", "value_proj", "intermediate.dense")
ALPHA = 32.0


class SVDLinear(nn.Linear):
    """The authors' layer: `weight` stays frozen, the delta is added at every call."""

    def __init__(self, plain: nn.Linear, kernel: int, seed: int) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.weight, self.bias = plain.weight, plain.bias
        source = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(0.6 * torch.randn(1, plain.in_features // kernel, generator=source))
        self.lora_B = nn.Parameter(0.6 * torch.randn(plain.out_features // kernel, 1, generator=source))
        self.lora_C = nn.Parameter(0.1 * torch.randn(1, 1, kernel, kernel, generator=source))
        self.ranknum = nn.Parameter(torch.tensor([4.0]), requires_grad=False)

    def delta(self) -> Tensor:
        """(in, out)"""
        image = (self.lora_A.T @ self.lora_B.T)[None, None]
        spread = nn.functional.conv_transpose2d(image, self.lora_C, stride=self.lora_C.shape[-1])
        return spread[0, 0] * ALPHA / (self.ranknum + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + x @ self.delta()


def pico_deberta(seed: int = 0, **settings: Any) -> Any:
    """A two-layer DeBERTa-v2 classifier, configured as v3 is unless `settings` say otherwise; random weights."""
    import transformers as t

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": 3, "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
        "position_biased_input": False, "pooler_hidden_size": 48, "type_vocab_size": 0,
    }  # fmt: skip
    model = t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**config | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def authors_model(model: Any, targets: tuple[str, ...] = TARGETS, kernel: int = 8) -> Any:
    """`model` with the authors' layers and their attention in it, as trained: unmerged."""
    for number, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and ".layer." in name and name.endswith(tuple(f".{end}" for end in targets)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SVDLinear(module, kernel, seed=number))
    return use_authors_attention(model)


def use_authors_attention(model: Any) -> Any:
    """Give every attention of `model` the authors' positional scores."""
    for module in model.modules():
        if type(module).__name__ == "DisentangledSelfAttention":
            module.disentangled_attention_bias = MethodType(_positional_scores, module)
    return model.eval()


def _positional_scores(
    self: Any,
    query_layer: Tensor,  # (B * H, L, size)
    key_layer: Tensor,  # (B * H, L, size)
    relative_pos: Tensor,  # (1, L, L)
    rel_embeddings: Tensor,  # (2 * span, hidden)
    scale_factor: int,
) -> Tensor:  # (B * H, L, L)
    heads, span = self.num_attention_heads, self.pos_ebd_size
    batch, length, size = query_layer.shape[0] // heads, query_layer.shape[1], query_layer.shape[2]
    relative = relative_pos.reshape(length, length).long()

    def by_head(projected: Tensor) -> Tensor:  # (H, 2 * span, size)
        return projected.view(2 * span, heads, size).transpose(0, 1)

    scores = torch.zeros(batch, heads, length, length, dtype=query_layer.dtype)
    q, k = query_layer.view(batch, heads, length, size), key_layer.view(batch, heads, length, size)
    if "c2p" in self.pos_att_type:
        key = self.key_proj(rel_embeddings) if self.share_att_key else self.pos_key_proj(rel_embeddings)
        place = (relative + span).clamp(0, 2 * span - 1)
        scores = scores + torch.einsum("bhid,hijd->bhij", q, by_head(key)[:, place])
    if "p2c" in self.pos_att_type:
        if self.share_att_key:
            query = nn.Linear.forward(self.query_proj, rel_embeddings)
        else:
            query = self.pos_query_proj(rel_embeddings)
        place = (span - relative.T).clamp(0, 2 * span - 1)
        scores = scores + torch.einsum("bhjd,hijd->bhij", k, by_head(query)[:, place])
    return (scores / (size * scale_factor) ** 0.5).view(batch * heads, length, length)


def save_authors_checkpoint(model: Any, folder: Path) -> Path:
    """The authors' file: one pickled state dict of the unmerged model, alpha in config.json alone."""
    folder.mkdir(parents=True)
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "apply_lora": True, "lora_type": "svd", "lora_r": 4,
               "lora_module": "query,key,value,intermediate", "lora_alpha": ALPHA}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def double_logits(model: Any, length: int = 17) -> Tensor:
    """(3, labels) float64, on three texts of which two are padded."""
    ids = torch.randint(5, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, length - 4 :] = 0
    mask[2, length // 2 :] = 0
    result: Tensor = model.double()(input_ids=ids, attention_mask=mask).logits
    return result
