"""Embeddings and output heads: tied or not, resized vocabularies, and the changes of the merged model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapter_merge.errors import MismatchError, Problem, UnsupportedError, raise_all
from adapter_merge.methods.adapter import AdapterFormat
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes, same_values
from adapter_merge.storage.tensor_io import read_tensor

from .bound import BoundAdapter

TIED_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
SHARED_EMBEDDINGS = ("shared.weight",)  # T5 and BART: encoder, decoder and head read one matrix


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config (of a vision-language model), or the whole config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def is_tied(base: Checkpoint) -> bool:
    """Return True when head and embedding are one tensor: as the config states, else when no head is stored."""
    stated = base.config.get("tie_word_embeddings", text_config(base.config).get("tie_word_embeddings"))
    if isinstance(stated, bool):
        return stated
    return bool(base.config) and not any(name.endswith(TIED_HEADS) for name in base.tensors)


def is_resized(name: str, old: TensorRef, new: TensorRef) -> bool:
    """Return True for an embedding or head whose shapes differ in the vocabulary size only."""
    head = name.endswith((*EMBEDDINGS, *TIED_HEADS, *SHARED_EMBEDDINGS)) or name in ("lm_head.bias",)
    return head and len(old.shape) == len(new.shape) and old.shape[1:] == new.shape[1:]


def add_config_changes(bound: BoundAdapter) -> BoundAdapter:
    """Return `bound` with the config changes of untied heads and resized vocabularies, and a copy of an untied head.

    Raises UnsupportedError for a shared embedding that is adapted only in part, MismatchError for vocabulary sizes that
    do not agree.
    """
    base = bound.base
    changes: dict[str, Any] = {}
    copies: dict[str, TensorRef] = {}
    changed = {item.name: item for item in bound.modules}
    touched = changed.keys() | bound.replacements.keys()
    embedding = next((name for name in base.tensors if name.endswith(EMBEDDINGS)), None)
    shared = next((name for name in base.tensors if name.endswith(SHARED_EMBEDDINGS)), None)
    heads = [name for name in touched if name.endswith(TIED_HEADS)]
    tied = is_tied(base)
    if shared in touched and tied:
        raise UnsupportedError(
            f"{shared}: encoder, decoder and head share this matrix, and only some of them were adapted",
            hint="untie them in the base first (save it with tie_word_embeddings false)",
        )
    if tied:
        raise_all(_check_tied(bound, embedding), UnsupportedError)
    if tied and embedding in touched and not heads and _has_language_head(bound):
        # PEFT trains a copy of the embeddings and does not change the head, except for single tokens and on request.
        tokens = embedding not in bound.replacements and isinstance(changed[embedding].module, TokenModule)
        if not tokens and not bound.adapter.tied:
            changes["tie_word_embeddings"] = False
            frozen = changed[embedding].weight if embedding in changed else base.tensors[embedding]
            copies["lm_head.weight"] = base.tensors[embedding] if embedding in bound.replacements else frozen
    elif tied and heads and not (embedding is not None and _replaced_by_same_values(bound, embedding, heads)):
        changes["tie_word_embeddings"] = False
    sizes = {
        ref.shape[0]
        for name, ref in [
            *bound.replacements.items(),
            *((item.name, item.weight) for item in bound.modules),
        ]
        if name.endswith((*EMBEDDINGS, *SHARED_EMBEDDINGS, *TIED_HEADS))
        and (old := base.tensors.get(name) or base.tensors.get(embedding or "")) is not None
        and ref.shape[0] != old.shape[0]
    }
    if len(sizes) == 1:
        changes["vocab_size"] = sizes.pop()
        raise_all(_check_head_sizes(bound, copies, changes["vocab_size"]), MismatchError)
    elif len(sizes) > 1:
        raise MismatchError("the adapter holds embeddings of different sizes", got=", ".join(map(str, sorted(sizes))))
    return replace(bound, config_changes=changes, copies={n: r for n, r in copies.items() if n not in base.tensors})


def _check_tied(bound: BoundAdapter, embedding: str | None) -> list[Problem]:
    """Return the problems of a PEFT folder that holds only one side of tied embeddings, or two different ones.

    PEFT trains a copy of what modules_to_save names. It loads any other whole tensor into the model itself, where
    embedding and head are one parameter; with ensure_weight_tying it saves both sides.
    """
    adapter = bound.adapter
    if adapter.format != AdapterFormat.PEFT or embedding is None or not _has_language_head(bound):
        return []
    saved = adapter.config.get("modules_to_save")
    modules = [module for module in saved if isinstance(module, str)] if isinstance(saved, list) else []
    whole = [
        name
        for name in adapter.replacements
        if name.endswith((*EMBEDDINGS, *TIED_HEADS)) and not any(f".{module}." in f".{name}" for module in modules)
    ]
    ends = (*EMBEDDINGS, *TIED_HEADS)
    replaced_heads = [name for name in bound.replacements if name.endswith(TIED_HEADS)]
    changed_names = (*bound.replacements, *(item.name for item in bound.modules))
    sides = {name.endswith(TIED_HEADS) for name in changed_names if name.endswith(ends)}
    whole_sides = {name.endswith(TIED_HEADS) for name in whole}
    problems = []
    if (whole_sides == {True, False} or (whole and len(sides) == 1)) and not (
        _replaced_by_same_values(bound, embedding, replaced_heads) or _keeps_embeddings(bound, embedding)
    ):
        problems.append(
            Problem(
                f"{adapter.folder}: holds {whole[0]} in whole, which modules_to_save does not name, and the base ties "
                "embeddings and head",
                expected="embeddings and head with the same values, or the trained one in modules_to_save",
                got=", ".join(whole),
                hint="was one of them trained, or both? Name it in modules_to_save of adapter_config.json",
            )
        )
    tokens = any(isinstance(item.module, TokenModule) for item in bound.modules)
    if adapter.tied and len(sides) == 1 and not tokens:
        problems.append(
            Problem(
                f"{adapter.folder}: adapts {'the head' if True in sides else 'the embeddings'} alone, and states "
                "ensure_weight_tying",
                expected="both, as PEFT saves them",
                hint="use the adapter_config.json of the training",
            )
        )
    if adapter.tied and not _has_equal_factors(bound):
        problems.append(
            Problem(
                f"{adapter.folder}: states ensure_weight_tying, and its factors of the head are not those of the "
                "embeddings",
                expected="one pair of factors for both, as PEFT loads them",
                hint="use the adapter_config.json of the training",
            )
        )
    return problems


def _keeps_embeddings(bound: BoundAdapter, embedding: str) -> bool:
    """Return True where everything that replaces the embeddings or the head has the values of the base."""
    replaced = [ref for name, ref in bound.replacements.items() if name.endswith((*EMBEDDINGS, *TIED_HEADS))]
    return all(same_values(bound.base.tensors[embedding], ref) for ref in replaced)


def _has_equal_factors(bound: BoundAdapter) -> bool:
    """Return True where the LoRA of the head equals the transposed one of the embeddings; True without both."""
    loras = [item for item in bound.modules if isinstance(item.module, LoraModule)]
    heads = [item.module for item in loras if item.name.endswith(TIED_HEADS)]
    embeddings = [item.module for item in loras if item.name.endswith(EMBEDDINGS)]
    return all(
        torch.equal(read_tensor(head.a), read_tensor(other.b).T)
        and torch.equal(read_tensor(head.b), read_tensor(other.a).T)
        for head in heads
        for other in embeddings
        if isinstance(head, LoraModule) and isinstance(other, LoraModule)
    )


def _check_head_sizes(bound: BoundAdapter, copies: dict[str, TensorRef], size: int) -> list[Problem]:
    """Return a problem for each head or embedding that would keep the old vocabulary size."""
    after = {**bound.base.tensors, **copies, **bound.replacements, **{m.name: m.weight for m in bound.modules}}
    return [
        Problem(
            f"{name}: the vocabulary was resized, but the adapter does not hold the resized head",
            f"{size} rows",
            f"{ref.shape[0]} rows",
            "PEFT does not save it when only the embeddings are targeted, and its new rows are in no file: give the "
            "resized model as BASE, or save again with the head in modules_to_save or target_modules too",
        )
        for name, ref in after.items()
        if name.endswith((*TIED_HEADS, *EMBEDDINGS))
        and len(ref.shape) == 2
        and ref.shape[0] != size
        and not (name not in copies and name not in bound.base.tensors)
    ]


def _has_language_head(bound: BoundAdapter) -> bool:
    """Return True when the base is a model with a language-model head."""
    architectures = bound.base.config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(architecture, str):
        return architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"))
    return bound.adapter.config.get("task_type") == "CAUSAL_LM"


def _replaced_by_same_values(bound: BoundAdapter, embedding: str, heads: list[str]) -> bool:
    """Return True when embedding and heads are replaced by the same values, as PEFT saves tied ones."""
    trained = bound.replacements.get(embedding)
    trained_heads = [bound.replacements.get(name) for name in heads]
    return (
        bool(trained_heads)
        and trained is not None
        and all(head is not None and same_bytes(trained, head) for head in trained_heads)
    )
