"""DeBERTa-v2 and v3 as DCFT's authors train them: positional queries from the frozen query_proj.

    score[i, j] += (q_i . kr[d(i, j)] + k_j . qr[d'(i, j)]) / sqrt(size * terms)
    kr = self.key_proj(r)                        adapted
    qr = nn.Linear.forward(self.query_proj, r)   frozen                                            r: (2 * span, hidden)

github Godz-z/DCFT, commit 38f71d2, modeling_deberta_v2.py, lines 784 to 887, for share_att_key. Their layers are built
with merge_weights=False, so this forward ran in training and in evaluation. Without share_att_key their attention is
that of transformers, with unadapted positional projections.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn


def use_authors_attention(model: nn.Module) -> None:
    """Make every shared attention of `model` compute its positional scores as DCFT's authors do.

    The adapted layers must keep their frozen weight as `weight` and add the delta in `forward`.
    """
    for module in model.modules():
        if type(module).__name__ == "DisentangledSelfAttention" and getattr(module, "share_att_key", False):
            attention: Any = module
            attention.disentangled_attention_bias = MethodType(_positional_scores, module)


def _positional_scores(
    attention: Any,
    query_layer: Tensor,  # (B * H, L, size)
    key_layer: Tensor,  # (B * H, L, size)
    relative_pos: Tensor,  # (1, L, L)
    rel_embeddings: Tensor,  # (>= 2 * span, hidden)
    scale_factor: int,  # 1 + the number of positional terms
) -> Tensor | int:  # (B * H, L, L)
    span, heads = attention.pos_ebd_size, attention.num_attention_heads
    embeddings = rel_embeddings[: 2 * span].unsqueeze(0)
    copies = query_layer.shape[0] // heads
    scale = (query_layer.shape[-1] * scale_factor) ** 0.5
    relative = relative_pos.reshape(relative_pos.shape[-2:]).long()  # (L, L)
    score: Tensor | int = 0
    if "c2p" in attention.pos_att_type:
        keys = attention.transpose_for_scores(attention.key_proj(embeddings), heads).repeat(copies, 1, 1)
        scores = query_layer @ keys.transpose(-1, -2)  # (B * H, L, 2 * span)
        place = (relative + span).clamp(0, 2 * span - 1)
        score = score + scores.gather(-1, place.expand(len(scores), -1, -1)) / scale
    if "p2c" in attention.pos_att_type:
        frozen = nn.Linear.forward(attention.query_proj, embeddings)
        queries = attention.transpose_for_scores(frozen, heads).repeat(copies, 1, 1)
        scores = key_layer @ queries.transpose(-1, -2)
        place = (span - relative).clamp(0, 2 * span - 1)
        score = score + scores.gather(-1, place.expand(len(scores), -1, -1)).transpose(-1, -2) / scale
    return score
