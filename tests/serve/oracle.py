"""What a served adapter must answer: the Hugging Face model with merged weights, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Oracle:
    """Greedy tokens and their log-probabilities for any adapter of one base."""

    def __init__(self, base: Path, weights: dict[str, Tensor]) -> None:
        import transformers

        self.weights = weights
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float64, attn_implementation="eager"
        )
        self.model.eval()

    @torch.inference_mode()
    def greedy(self, merged: dict[str, Tensor], prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after `prompt` and their log-probabilities, with `merged` in place."""
        self.model.load_state_dict({**self.weights, **merged}, strict=True)
        tokens: list[int] = []
        values: list[float] = []
        state = None
        step = torch.tensor([prompt])
        for _ in range(count):
            answer = self.model(step, past_key_values=state, use_cache=True)
            state = answer.past_key_values
            logits = answer.logits[0, -1].log_softmax(-1)
            tokens.append(int(logits.argmax()))
            values.append(float(logits.max()))
            step = torch.tensor([tokens[-1:]])
        return tokens, values
