"""Comparison of an artefact's logits and greedy tokens with the live, unmerged adapter (streamed_adapter.py).

One model runs at a time, with one part of it in memory and all prompts in one batch: see streamed_model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.errors import InputError, UnsupportedError

from .key_value_cache import cache_argument, cache_of
from .live_adapter import generates, quiet_libraries
from .streamed_adapter import streamed_artefact, streamed_base, streamed_combination, streamed_trained

PROMPTS = (
    "What is the capital of France?",
    "How do I make a good cup of tea?",
    "Tell me about the sea.",
    "Write one sentence about a small dog.",
)
Say = Callable[[str], None]  # called with a line on the current step


@dataclass(frozen=True)
class LogitFigures:
    """Differences between the artefact's logits and the live adapter's."""

    max_difference: float
    mean_difference: float
    greedy_equal: int  # positions where both would choose the same token
    greedy_total: int
    effect: float  # max |dlogit| between base and adapter


@dataclass(frozen=True)
class TokenPath:
    """The tokens of one comparison: a prompt and the live adapter's answer."""

    ids: Tensor  # (T,)
    start: int  # the first position whose choice of a token is compared


def live_network(bound: BoundAdapter, dtype: torch.dtype) -> nn.Module:
    """Return the model with the adapter as trained, or with a combination; its weights are streamed."""
    if isinstance(bound, CombinedBound):
        return streamed_combination(bound, dtype).model
    return streamed_trained(bound, dtype).model


def token_paths(
    bound: BoundAdapter, prompts: Sequence[str] | None, generated: int, say: Say = lambda text: None
) -> list[TokenPath]:
    """Return every prompt followed by the `generated` tokens that the live adapter chooses greedily."""
    live: Any = live_network(bound, torch.float32)
    rows = _prompt_ids(bound, prompts, live)
    if not generates(live) or live.config.is_encoder_decoder or not generated:
        return [TokenPath(ids, 0) for ids in rows]
    answers = _greedy(live, rows, generated, say)
    return [TokenPath(torch.cat((ids, answer)), len(ids) - 1) for ids, answer in zip(rows, answers, strict=True)]


@torch.no_grad()
def _greedy(model: Any, rows: Sequence[Tensor], count: int, say: Say) -> Tensor:
    """Return the greedy tokens after each prompt (B, count), without end tokens; each step is one batched forward."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    size = int(model.config.get_text_config().vocab_size)
    ends = torch.tensor(
        [token for token in (stated if isinstance(stated, list) else [stated]) if token is not None and token < size],
        dtype=torch.int64,
    )
    ids, mask = _padded(rows, 0, left=True)
    new_ids, cache, chosen = ids, None, []
    for step in range(count):
        say(f"the adapter as trained: token {step + 1} of {count}")
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -new_ids.shape[1] :]
        inputs: dict[str, Any] = {"input_ids": new_ids, "attention_mask": mask}
        if len({len(row) for row in rows}) > 1:
            inputs["position_ids"] = positions
        result = model(**inputs, **cache_argument(cache), use_cache=True)
        token = result.logits[:, -1].index_fill(1, ends, -math.inf).argmax(-1, keepdim=True)
        chosen.append(token)
        ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
        cache = cache_of(result)
        new_ids = ids if cache is None else token
    return torch.cat(chosen, 1)


def _padded(rows: Sequence[Tensor], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both (B, T)."""
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def compare_logits(
    bound: BoundAdapter, folder: Path, kind: str, paths: Sequence[TokenPath], dtype: torch.dtype, say: Say
) -> LogitFigures:
    """Compare base, live adapter and artefact on the same tokens, all computing in `dtype`."""
    say(f"logits of the adapter as trained, {dtype}".replace("torch.", ""))
    expected = all_logits(live_network(bound, dtype), paths)
    before: list[Tensor] = []
    if "vocab_size" not in bound.config_changes:  # a base of another vocabulary does not know all tokens
        say("logits of the base")
        before = all_logits(streamed_base(bound.base, dtype).model, paths)
    effect = math.nan
    for base, want in zip(before, expected, strict=False):
        if base.shape == want.shape:
            largest = float((base - want).abs().max())
            effect = largest if math.isnan(effect) else max(effect, largest)
    del before
    say("logits of the artefact")
    logits = all_logits(streamed_artefact(bound, folder, kind, dtype).model, paths, folder)
    worst, mean, equal, total = 0.0, 0.0, 0, 0
    for path, live, actual in zip(paths, expected, logits, strict=True):
        if live.shape != actual.shape:
            return LogitFigures(math.inf, math.inf, 0, live.shape[0], effect)
        difference = (actual - live).abs()
        worst = max(worst, float(difference.max())) if not bool(difference.isnan().any()) else math.nan
        mean += float(difference.mean()) / len(paths)
        is_equal = actual.argmax(-1) == live.argmax(-1)
        is_equal = is_equal[path.start :] if is_equal.dim() == 1 else is_equal.reshape(1)
        equal += int(is_equal.sum())
        total += is_equal.numel()
        if math.isnan(worst):
            return LogitFigures(worst, math.nan, 0, total, effect)
    return LogitFigures(worst, mean, equal, total, effect)


def _prompt_ids(bound: BoundAdapter, prompts: Sequence[str] | None, model: Any) -> list[Tensor]:
    """Return token ids (T,) per prompt; four seeded random rows of 16 where the base has no tokenizer."""
    rows = tokenized(bound.base.folder, prompts)
    if rows is not None:
        return rows
    if prompts:
        raise InputError(f"{bound.base.folder}: has no tokenizer", hint="without --prompt, random tokens are compared")
    size = int(model.config.get_text_config().vocab_size)
    source = torch.Generator().manual_seed(0)
    return list(torch.randint(min(5, size - 1), size, (4, 16), generator=source))


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder`, None where there is none. Raises InputError where it cannot be loaded."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    import transformers

    try:
        with quiet_libraries():
            return transformers.AutoTokenizer.from_pretrained(folder)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded", got=f"{error!s:.200}") from error


def tokenized(folder: Path, prompts: Sequence[str] | None) -> list[Tensor] | None:
    """Return the token ids (T,) of each prompt, in the chat template if there is one; None without a tokenizer."""
    tokenizer = open_tokenizer(folder)
    if tokenizer is None:
        return None
    rows = []
    with quiet_libraries():
        for prompt in prompts or PROMPTS:
            if getattr(tokenizer, "chat_template", None):
                turn = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            else:
                encoded = tokenizer(prompt, return_tensors="pt")
            rows.append(encoded["input_ids"][0])
    return rows


@torch.no_grad()
def all_logits(model: Any, paths: Sequence[TokenPath], folder: Path | None = None) -> list[Tensor]:
    """Return the logits (T, vocabulary) per path, or (labels,) for a classifier; one forward for all paths.

    folder: the model's folder, for the error. Raises UnsupportedError for a model without logits.
    """
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids, mask = _padded([path.ids for path in paths], pad if isinstance(pad, int) and pad >= 0 else 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    batches = [inputs]
    if not generates(model) and not isinstance(
        pad, int
    ):  # a decoder with a classifier needs a padding token for a batch
        batches = [
            {key: value[row : row + 1, : len(path.ids)] for key, value in inputs.items()}
            for row, path in enumerate(paths)
        ]
    outputs = [model(**batch) for batch in batches]
    if any(getattr(output, "logits", None) is None for output in outputs):
        raise UnsupportedError(
            f"{folder or 'the model'}: its class {type(model).__name__} computes no logits",
            expected="a model with a head, as named in architectures of its config.json",
            hint="--weights-only compares only the weights",
        )
    logits = [row for output in outputs for row in output.logits]
    return [row[: len(path.ids)] if row.dim() == 2 else row for row, path in zip(logits, paths, strict=True)]
