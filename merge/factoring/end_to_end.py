"""The certificate's last part: a model with the factors in it against the adapter as trained, on texts.

The adapter as trained is live and unmerged (live_adapter.py). It continues every prompt greedily; all figures are taken
over prompt and continuation, teacher-forced, in float32. Where every greedy token of a continuation agrees, the model
with the factors would have written the very same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import InputError
from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.storage.checkpoint import read_json, read_weights
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.verification.live_adapter import continued, generates, load_model, quiet_libraries
from adapter_merge.verification.live_model import trained_model

from .factor_folder import ROW_SCALES

GENERATED = 24
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "List three things to pack for a rainy day.",
    "Write a short note to a neighbour about a lost cat.",
)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module `name` of the adapter in `model`, whatever leading components the class or PEFT adds or drops.

    Raises InputError.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name in modules:
        return modules[name]
    found = [path for path in modules if path.endswith(f".{name}")]
    if len(found) == 1:
        return modules[found[0]]
    shorter = name.partition(".")[2]
    if shorter in modules:
        return modules[shorter]
    raise InputError(f"{name}: the model class {type(model).__name__} has no such module")


def tokens(folder: Path, model: nn.Module, prompts: Sequence[str] | None) -> list[Tensor]:
    """Token ids (1, T) of every prompt, as a chat's turn where the tokenizer has a template.

    Without a tokenizer, seeded random tokens stand in for the built-in prompts; own prompts raise InputError then.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        if prompts is not None:
            raise InputError(f"{folder}: has no tokenizer", hint="leave the prompts out: random tokens are used")
        size = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        random = torch.Generator().manual_seed(0)
        return [torch.randint(0, size, (1, 24), generator=random) for _ in PROMPTS]
    import transformers

    with quiet_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if getattr(tokenizer, "chat_template", None) and generates(model):
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts or PROMPTS
            ]
            return [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in texts]
        return [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts or PROMPTS]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """float32 logits (T, vocabulary) or (1, labels) for ids (1, T); both ends of a span model side by side (T, 2)."""
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = getattr(output, "logits", None)
    if found is None:
        found = torch.stack((output.start_logits, output.end_logits), dim=-1)
    result: Tensor = found[0].float()
    return result if result.dim() == 2 else result[None]


@torch.no_grad()
def install_factors(model: nn.Module, folder: Path) -> None:
    """Put the factors in `folder` into a float32 base model: W0 + B A, its rows scaled where the folder says so."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for ref in read_weights(folder / "adapter_model.safetensors").tensors:
        name, _, role = ref.name.removeprefix(PREFIX).partition(".lora_")
        if role in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            pairs.setdefault(name, {})[role] = read_tensor(ref)
    scales = {}
    if (folder / ROW_SCALES).is_file():
        scales = {
            ref.name.removeprefix(PREFIX).removesuffix(".row_scale"): read_tensor(ref)
            for ref in read_weights(folder / ROW_SCALES).tensors
        }
    tied = bool(read_json(folder / "adapter_config.json").get("ensure_weight_tying"))
    for name, pair in pairs.items():
        layer = submodule(model, name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if "embedding_A" in pair:
            new = weight + (pair["embedding_B"] @ pair["embedding_A"]).T
            if tied:
                weight.data.copy_(new)
                continue
        else:
            turned = type(layer).__name__ == "Conv1D"
            new = (weight.T if turned else weight) + pair["B.weight"] @ pair["A.weight"]
            if name in scales:
                new = scales[name][:, None] * new
            new = new.T if turned else new
        layer.weight = nn.Parameter(new.contiguous(), requires_grad=False)  # its own: a tied head stays as it was


@torch.no_grad()
def install_replacements(model: nn.Module, folder: Path) -> None:
    """Put the folder's heads and biases into a float32 base model; of a trained tied pair, each gets its own."""
    file, written = folder / REPLACEMENTS, set()
    for ref in read_weights(file).tensors if file.is_file() else ():
        name = ref.name
        path, _, kind = name.rpartition(".")
        layer = submodule(model, path)
        value = read_tensor(ref).float()
        old = getattr(layer, kind)
        if old.shape == value.shape and old.data_ptr() not in written:
            old.copy_(value)
            written.add(old.data_ptr())
        else:
            setattr(layer, kind, nn.Parameter(value, requires_grad=False))


def compare(bound: BoundAdapter, folder: Path, prompts: Sequence[str] | None = None) -> dict[str, Any]:
    """The figures of the factors in `folder` against the adapter as trained. Loads the model twice, one at a time."""
    live = trained_model(bound)
    paths, expected, starts = [], [], []
    writes = generates(live)
    for ids in tokens(bound.base.folder, live, prompts):
        starts.append(ids.shape[1] - 1 if writes else 0)
        path = continued(live, ids, GENERATED) if writes else ids
        paths.append(path)
        expected.append(logits(live, path))
    del live
    other = load_model(bound.base.folder).float()
    before = [logits(other, path) for path in paths]
    install_replacements(other, folder)
    install_factors(other, folder)
    got = [logits(other, path) for path in paths]
    return figures(paths, starts, expected, got, before, writes)


def figures(
    paths: Sequence[Tensor],  # (1, T) each
    starts: Sequence[int],
    expected: Sequence[Tensor],  # (T, vocabulary) each
    got: Sequence[Tensor],
    before: Sequence[Tensor],
    writes: bool,
) -> dict[str, Any]:
    """max and mean |dlogit|, KL(as trained || factors) in nats, greedy agreement, perplexity; the adapter's effect."""
    differences = [(mine - want).abs() for mine, want in zip(got, expected, strict=True)]
    divergences = torch.cat(
        [
            torch.nn.functional.kl_div(
                mine.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
            for mine, want in zip(got, expected, strict=True)
        ]
    )
    same = [
        (mine.argmax(-1) == want.argmax(-1))[start:] for mine, want, start in zip(got, expected, starts, strict=True)
    ]
    effects = [
        float((old - want).abs().max()) for old, want in zip(before, expected, strict=True) if old.shape == want.shape
    ]
    content: dict[str, Any] = {
        "texts": len(paths),
        "positions": int(divergences.numel()),
        "max_dlogit": max(float(part.max()) for part in differences),
        "mean_dlogit": sum(float(part.sum()) for part in differences) / sum(part.numel() for part in differences),
        "max_kl": float(divergences.max().clamp_min(0)),
        "mean_kl": float(divergences.mean().clamp_min(0)),
        "greedy_equal": sum(int(part.sum()) for part in same),
        "greedy_total": sum(part.numel() for part in same),
        "texts_equal": sum(bool(part.all()) for part in same),
        "effect": max(effects, default=math.nan),
        "perplexity": None,
    }
    if writes:
        content["perplexity"] = {
            "base": _perplexity(paths, before),
            "trained": _perplexity(paths, expected),
            "factors": _perplexity(paths, got),
        }
    return _short(content)


def _perplexity(paths: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(row[:-1], ids[0, 1:], reduction="none")
        for ids, row in zip(paths, found, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))


def _short(content: dict[str, Any]) -> dict[str, Any]:
    short: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = _short(value)
        elif isinstance(value, float):
            value = float(f"{value:.6g}") if math.isfinite(value) else None
        short[key] = value
    return short
