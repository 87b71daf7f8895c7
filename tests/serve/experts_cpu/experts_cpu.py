"""A kernel of LoRA on experts in plain torch, since vLLM's is Triton's, which needs a GPU: a plugin of vLLM for tests.

It replaces TritonExperts.apply alone. What decides whether an adapter is served right is vLLM's own: the names that it
takes, the packing of experts, the slots, and the slot of every token.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = apply


def apply(
    self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any
) -> None:
    """Write the sum of each token's experts, weighted by the router, SwiGLU between the two products."""
    import torch

    context = self._lora_context
    slots = context.punica_wrapper.token_lora_indices.tolist() if context is not None else []
    total = torch.zeros_like(output)
    for token, x in enumerate(hidden_states):
        slot = slots[token] if token < len(slots) else -1
        for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            both = w1[expert] @ x
            if slot >= 0:
                pairs = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                both = both + torch.cat([b[slot, expert] @ (a[slot, expert] @ x) for a, b in pairs])
            gate, up = both.chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            y = w2[expert] @ inner
            if slot >= 0:
                a, b = context.w2_lora_a_stacked[0], context.w2_lora_b_stacked[0]
                y = y + b[slot, expert] @ (a[slot, expert] @ inner)
            total[token] += weight.to(y.dtype) * y
    output.copy_(total)
