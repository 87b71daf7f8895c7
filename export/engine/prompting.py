"""Prompts and sampling: chat template, tokenizer, limit of the length, choice of the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError
from adapter_merge.storage.checkpoint import read_json

from .decoder_settings import decoder_settings
from .providers import check_packages


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Prompter:
    """The tokenizer and chat template of an export."""

    def __init__(self, folder: Path) -> None:
        check_packages("transformers")
        from transformers import AutoTokenizer

        from adapter_merge.verification.live_adapter import quiet_libraries

        with quiet_libraries():
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        settings = decoder_settings(folder)
        stops = settings["model"]["eos_token_id"] if settings else None
        if stops is None:
            stops = self.tokenizer.eos_token_id
        self.stops = frozenset(stops if isinstance(stops, list) else [stops])

    def encode(self, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
        """Return the token ids of `prompt` in the chat template; without it where raw is set or the model has none.

        Raises InputError for an empty prompt, and for `system` without a chat template.
        """
        if raw or not self.tokenizer.chat_template:
            if system is not None:
                raise InputError(
                    "--system needs a chat template", hint="leave --raw out, or put the system text into the prompt"
                )
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError("the prompt is empty")
        return [int(token) for token in ids]

    def stream(self) -> Callable[[int], str]:
        """Return a function from the next token to the text that it completes.

        A character may consist of several tokens.
        """
        tokens: list[int] = []
        shown = ""

        def push(token: int) -> str:
            nonlocal shown
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                return ""
            new, shown = text[len(shown) :], text
            return str(new)

        return push


def limit_to_context(folder: Path, prompt: int, sampling: Sampling) -> Sampling:
    """Return `sampling` with max_tokens limited to the rest of the context after `prompt` tokens.

    Raises InputError for a prompt that fills the context.
    """
    settings = decoder_settings(folder)
    if settings:
        limit = int(settings["model"]["context_length"])
    else:
        config = read_json(folder / "config.json")
        limit = int(config.get("n_positions") or config["max_position_embeddings"])
    if prompt >= limit:
        raise InputError(
            f"the prompt is too long for {folder}", expected=f"fewer than {limit} tokens", got=f"{prompt} tokens"
        )
    return replace(sampling, max_tokens=min(sampling.max_tokens, limit - prompt))


def make_chooser(sampling: Sampling) -> Callable[[Any], int]:
    """Return a function from logits (vocabulary,) to the next token."""
    import numpy as np

    if sampling.temperature <= 0:
        return lambda logits: int(np.argmax(logits))
    random = np.random.default_rng(sampling.seed)

    def choose(logits: Any) -> int:
        scaled = logits.astype(np.float64) / sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        nucleus = order[: int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1]
        weights = probabilities[nucleus] / probabilities[nucleus].sum()
        return int(random.choice(nucleus, p=weights))

    return choose
