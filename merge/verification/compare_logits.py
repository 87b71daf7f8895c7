"""Logits and greedy tokens of an artefact against the live, unmerged adapter (live_adapter.py), and its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import InputError
from adapter_merge.formats.peft.tensors import REPLACEMENTS
from adapter_merge.storage.checkpoint import read_weights
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .compare_weights import WEIGHT_TOLERANCE, exact_weight
from .live_adapter import (
    continued,
    generates,
    is_embedding,
    live_layer,
    load_model,
    model_config,
    quiet_libraries,
    replace_tensors,
    require,
    with_heads,
)
from .live_model import trained_model

PROBES = 8
PROMPTS = (
    "What is the capital of France?",
    "How do I make a good cup of tea?",
    "Tell me about the sea.",
    "Write one sentence about a small dog.",
)


@dataclass(frozen=True)
class LogitFigures:
    """The artefact's logits against the live adapter's."""

    max_difference: float
    mean_difference: float
    greedy_equal: int  # positions where both would choose the same token
    greedy_total: int
    effect: float  # max |dlogit| of the adapter itself: what would be lost without it


@torch.no_grad()
def unlike_live(bound: BoundAdapter, live: nn.Module) -> list[str]:
    """Modules whose live forward is not the W' that the weights were compared with.

    `live` is the adapter as trained, in float64. Each module gets random inputs X (PROBES, in); its answer without
    the bias must be X W'^T. The weight figures rest on the project's own algebra; this holds that algebra against code
    that does not share it, and a shared mistake cannot pass.
    """
    source = torch.Generator().manual_seed(0)
    wrong = []
    for item in bound.modules:
        layer = live_layer(live, item.module.name)
        found = exact_weight(item)
        base, exact = found.base, found.after
        if base.dim() != 2 or not hasattr(layer, "forward"):
            continue
        turned = exact.T if item.transposed else exact
        base = base.T if item.transposed else base
        if is_embedding(layer):
            ids = torch.randint(turned.shape[0], (PROBES,), generator=source)
            got, want, plain = layer(ids), turned[ids], base[ids]
        else:
            x = torch.randn(PROBES, turned.shape[1], generator=source, dtype=torch.float64)
            got = layer(x) - layer(torch.zeros_like(x))
            want, plain = x @ turned.T, x @ base.T
        error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want - plain).clamp_min(1e-300)
        if not float(error) <= WEIGHT_TOLERANCE:
            wrong.append(item.name)
    return wrong


@dataclass(frozen=True)
class TokenPath:
    """Tokens to compare on: a prompt and what the live adapter says to it."""

    ids: Tensor  # (B, T)
    start: int  # the first position whose choice of a token is compared


def token_paths(bound: BoundAdapter, prompts: Sequence[str] | None, generated: int) -> list[TokenPath]:
    live = trained_model(bound)
    found = []
    for ids in _token_batches(bound, prompts, live):
        if generates(live):
            found.append(TokenPath(continued(live, ids, generated, all_of_it=True), ids.shape[1] - 1))
        else:
            found.append(TokenPath(ids, 0))
    return found


def compare_logits(
    bound: BoundAdapter, folder: Path, kind: str, paths: Sequence[TokenPath], dtype: torch.dtype
) -> LogitFigures:
    """Base, live adapter and artefact on the same tokens, all computing in `dtype`; one model in memory at a time."""
    before = _all_logits(load_model(bound.base.folder).to(dtype), paths)
    expected = _all_logits(trained_model(bound, dtype), paths)
    found = _all_logits(_artefact_model(bound, folder, kind, dtype), paths)
    worst, mean, effect, equal, total = 0.0, 0.0, math.nan, 0, 0
    for path, base, want, got in zip(paths, before, expected, found, strict=True):
        difference = (got - want).abs()
        worst = max(worst, float(difference.max())) if not bool(difference.isnan().any()) else math.nan
        mean += float(difference.mean()) / len(paths)
        same = got.argmax(-1) == want.argmax(-1)
        same = same[:, path.start :] if same.dim() == 2 else same
        equal += int(same.sum())
        total += same.numel()
        if base.shape == want.shape:
            own = float((base - want).abs().max())
            effect = own if math.isnan(effect) else max(effect, own)
    return LogitFigures(worst, mean, equal, total, effect)


def _artefact_model(bound: BoundAdapter, folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    if kind == "merged model":
        return load_model(folder).to(dtype)
    if kind == "factors":
        require("peft")
        import peft

        model = load_model(bound.base.folder)
        with quiet_libraries():
            loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
        heads = folder / REPLACEMENTS
        own = {ref.name: ref for ref in read_weights(heads).tensors} if heads.is_file() else {}
        return with_heads(loaded.to(dtype), own).eval()
    if kind == "adapter":
        return trained_model(open_pair(bound.base.folder, folder, bound.base_kind), dtype)
    config = model_config(bound)
    for key, value in bound.config_changes.items():
        setattr(config, key, value)
    model = load_model(bound.base.folder, config).to(dtype)
    state = model.state_dict()
    deltas = {ref.name: ref for ref in read_weights(folder / "delta.safetensors").tensors}
    added = {item.name: item.weight for item in bound.modules if item.name not in bound.base.tensors}
    own = {**bound.copies, **added}
    names = _state_names(state, own | deltas)
    for name, ref in own.items():
        state[names[name]].copy_(read_tensor(ref))
    for name, ref in deltas.items():
        state[names[name]].add_(read_tensor(ref).to(dtype))
    replace_tensors(model, bound.replacements)
    return model


def _state_names(state: Mapping[str, Tensor], wanted: Mapping[str, TensorRef]) -> dict[str, str]:
    """The model's name of each tensor: as it is, or with a leading component more or less."""
    names = {}
    for name in wanted:
        short = name.partition(".")[2]
        longer = [key for key in state if key.partition(".")[2] == name]
        names[name] = name if name in state else short if short in state else longer[0] if longer else name
    return names


def _token_batches(bound: BoundAdapter, prompts: Sequence[str] | None, model: nn.Module) -> list[Tensor]:
    """Token ids (1, T) per prompt; two seeded random batches (2, 16) where the base has no tokenizer."""
    folder = bound.base.folder
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        import transformers

        with quiet_libraries():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            batches = []
            for prompt in prompts or PROMPTS:
                if getattr(tokenizer, "chat_template", None):
                    turn = [{"role": "user", "content": prompt}]
                    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
                else:
                    encoded = tokenizer(prompt, return_tensors="pt")
                batches.append(encoded["input_ids"])
        return batches
    if prompts:
        raise InputError(f"{folder}: has no tokenizer", hint="leave --prompt out: random tokens are used")
    size = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    source = torch.Generator().manual_seed(0)
    return [torch.randint(5, size, (2, 16), generator=source) for _ in range(2)]


@torch.no_grad()
def _all_logits(model: nn.Module, paths: Sequence[TokenPath]) -> list[Tensor]:
    """Per path the logits (B, T, vocabulary), or (B, labels) for a classifier."""
    return [model(input_ids=path.ids, attention_mask=torch.ones_like(path.ids)).logits for path in paths]
