"""End-to-end part of the certificate: a model with the factors compared with the adapter as trained, on texts.

The adapter as trained runs live and unmerged (live_adapter.py) and continues every prompt greedily. All figures are
measured over prompt and continuation, teacher-forced, in float32. Where all greedy tokens of a continuation are equal,
the model with the factors would generate the same text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import InputError
from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.storage.checkpoint import read_json, read_weights
from adapter_merge.storage.module_paths import match_module_paths
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.verification.live_adapter import continued, generates, load_model, quiet_libraries, require_tokens
from adapter_merge.verification.live_model import trained_model

from .factor_folder import ROW_SCALES

GENERATED = 24  # tokens after each prompt
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "List three things to pack for a rainy day.",
    "Write a short note to a neighbour about a lost cat.",
)


def find_submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module of `model` that the adapter calls `name`.

    Its path in the model may have further leading components, or lack the first one, because model classes and PEFT add
    and remove them. Raises InputError where the model has no such module.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    match = match_module_paths([name], modules).get(name)
    if match is not None:
        return modules[match]
    longer = [path for path in modules if path.endswith(f".{name}")]
    if len(longer) == 1:
        return modules[longer[0]]
    raise InputError(f"{name}: the model class {type(model).__name__} has no such module")


def tokenize_prompts(folder: Path, model: nn.Module, prompts: Sequence[str] | None) -> list[Tensor]:
    """Return the token ids (1, T) int64 of every prompt, as a user's turn where the tokenizer has a chat template.

    Without a tokenizer, seeded random tokens replace the built-in prompts; prompts of the caller raise InputError.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        if prompts is not None:
            raise InputError(f"{folder}: has no tokenizer", hint="state no prompts: random tokens are then used")
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
def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return float32 logits for ids (1, T): (T, vocabulary), or (1, labels) of a classifier.

    For a question-answering model, the start and end logits as (T, 2).
    """
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    batch = getattr(output, "logits", None)
    if batch is None:
        batch = torch.stack((output.start_logits, output.end_logits), dim=-1)
    result: Tensor = batch[0].float()
    return result if result.dim() == 2 else result[None]


@torch.no_grad()
def install_factors(model: nn.Module, folder: Path) -> None:
    """Add the factors in `folder` to a float32 base model: W0 + B A, times the row scales if there are any."""
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
        layer = find_submodule(model, name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if "embedding_A" in pair:
            new = weight + (pair["embedding_B"] @ pair["embedding_A"]).T
            if tied:
                weight.data.copy_(new)
                continue
        else:
            transposed = type(layer).__name__ == "Conv1D"
            matrix = weight.T if transposed else weight.flatten(1)  # of a convolution (out, in k ...)
            new = matrix + pair["B.weight"].flatten(1) @ pair["A.weight"].flatten(1)
            if name in scales:
                new = scales[name][:, None] * new
            new = new.T if transposed else new.reshape(weight.shape)
        layer.weight = nn.Parameter(
            new.contiguous(), requires_grad=False
        )  # a new parameter: a tied head keeps its values


@torch.no_grad()
def install_replacements(model: nn.Module, folder: Path) -> None:
    """Replace heads and biases of a float32 base model by those in `folder`.

    A replaced tensor that is tied in the model (an embedding and its head) gets its own parameter, as in PEFT, unless
    the adapter's config sets `ensure_weight_tying`.
    """
    file, written = folder / REPLACEMENTS, set()
    tied = bool(read_json(folder / "adapter_config.json").get("ensure_weight_tying"))
    uses = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    for ref in read_weights(file).tensors if file.is_file() else ():
        name = ref.name
        path, _, kind = name.rpartition(".")
        layer = find_submodule(model, path)
        value = read_tensor(ref).float()
        old = getattr(layer, kind)
        is_untied = tied or uses[old.data_ptr()] <= 1
        if is_untied and old.shape == value.shape and old.data_ptr() not in written:
            old.copy_(value)
            written.add(old.data_ptr())
        else:
            setattr(layer, kind, nn.Parameter(value, requires_grad=False))


def compare(bound: BoundAdapter, folder: Path, prompts: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare the model with the factors in `folder` with the adapter as trained; return the figures as JSON values.

    The model is loaded twice, one instance after the other.
    """
    require_tokens(bound.base.folder)
    live = trained_model(bound)
    sequences, expected, starts = [], [], []
    generative = generates(live)
    for ids in tokenize_prompts(bound.base.folder, live, prompts):
        starts.append(ids.shape[1] - 1 if generative else 0)
        sequence = continued(live, ids, GENERATED) if generative else ids
        sequences.append(sequence)
        expected.append(compute_logits(live, sequence))
    del live
    other = load_model(bound.base).float()
    before = [compute_logits(other, sequence) for sequence in sequences]
    install_replacements(other, folder)
    install_factors(other, folder)
    got = [compute_logits(other, sequence) for sequence in sequences]
    return measure_figures(sequences, starts, expected, got, before, generative)


def measure_figures(
    sequences: Sequence[Tensor],  # (1, T) int64 each
    starts: Sequence[int],  # first position whose greedy token is compared
    expected: Sequence[Tensor],  # (T, vocabulary) each: logits of the adapter as trained
    got: Sequence[Tensor],  # of the model with the factors
    before: Sequence[Tensor],  # of the base
    generative: bool,  # measure the perplexity as well
) -> dict[str, Any]:
    """Return max and mean |dlogit|, KL(as trained || factors) in nats, equal greedy tokens, perplexity, and the effect.

    The effect is max |dlogit| between the base and the adapter as trained.
    """
    differences = [
        (logits_got - logits_expected).abs() for logits_got, logits_expected in zip(got, expected, strict=True)
    ]
    divergences = torch.cat(
        [
            torch.nn.functional.kl_div(
                logits_got.log_softmax(-1), logits_expected.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
            for logits_got, logits_expected in zip(got, expected, strict=True)
        ]
    )
    same = [
        (logits_got.argmax(-1) == logits_expected.argmax(-1))[start:]
        for logits_got, logits_expected, start in zip(got, expected, starts, strict=True)
    ]
    effects = [
        float((logits_base - logits_expected).abs().max())
        for logits_base, logits_expected in zip(before, expected, strict=True)
        if logits_base.shape == logits_expected.shape
    ]
    content: dict[str, Any] = {
        "texts": len(sequences),
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
    if generative:
        content["perplexity"] = {
            "base": _compute_perplexity(sequences, before),
            "trained": _compute_perplexity(sequences, expected),
            "factors": _compute_perplexity(sequences, got),
        }
    return _round_floats(content)


def _compute_perplexity(sequences: Sequence[Tensor], predicted: Sequence[Tensor]) -> float:
    """Return the perplexity of the sequences (1, T) under the logits (T, vocabulary)."""
    losses = [
        torch.nn.functional.cross_entropy(row[:-1], ids[0, 1:], reduction="none")
        for ids, row in zip(sequences, predicted, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))


def _round_floats(content: dict[str, Any]) -> dict[str, Any]:
    """Round all floats to six digits; None for infinity and NaN."""
    rounded: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = _round_floats(value)
        elif isinstance(value, float):
            value = float(f"{value:.6g}") if math.isfinite(value) else None
        rounded[key] = value
    return rounded
