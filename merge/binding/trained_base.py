"""The base that an adapter was trained on, where it was quantised on loading: QLoRA on an unquantised checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError, MissingDependencyError, Problem, UnsupportedError, raise_all
from adapter_merge.files.installation import install_command
from adapter_merge.methods.adapter import Adapter
from adapter_merge.quantisation.dense_view import open_base, packed_weights
from adapter_merge.quantisation.simulated_4bit import SimulatedWeight, TrainedOn, parse_trained_on
from adapter_merge.quantisation.transposed_cache import TransposedCache
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

from .transformers_names import build_model

FOUR_BIT_NAMES = ("-bnb-4bit", "-unsloth-bnb-4bit")  # endings of hub names of bases in bitsandbytes' nf4


def open_trained_base(folder: str | Path, trained_on: str | None = None) -> Checkpoint:
    """Open the base in `folder`; where `trained_on` states a quantisation, with the weights of the training.

    Reads headers only. Every linear layer that transformers would quantise with bitsandbytes becomes deq(q(W)), also
    those that no adapter changes.
    Raises InputError for a base that is quantised already, UnsupportedError where transformers loads a linear layer
    from a tensor of another name or shape, MissingDependencyError without transformers.
    """
    base = open_base(folder)
    settings = None if trained_on is None else parse_trained_on(trained_on)
    if settings is None:
        return base
    if base.stored is not None:
        schemes = sorted({weight.scheme for weight in packed_weights(base).values()})
        raise InputError(
            f"{base.folder}: --trained-on {trained_on} is for an unquantised base",
            expected="the checkpoint that was quantised when it was loaded for training",
            got=", ".join(schemes) or "a view of another file",
            hint="leave --trained-on out: the adapter is then merged into the values of this base",
        )
    return simulated_view(base, settings)


def simulated_view(base: Checkpoint, settings: TrainedOn) -> Checkpoint:
    """Return `base` with every weight that bitsandbytes quantises replaced by deq(q(W))."""
    names = _quantised_names(base)
    cache = TransposedCache()
    shards = []
    for shard in base.shards:
        tensors = tuple(
            SimulatedWeight(ref, settings, cache).as_ref() if ref.name in names else ref for ref in shard.tensors
        )
        shards.append(replace(shard, tensors=tensors, is_whole=shard.is_whole and tensors == shard.tensors))
    note = f"{len(names)} weights are those of the training, {settings}, not the stored weights"
    return replace(base, shards=tuple(shards), stored=base, notes=(note,))


def is_simulated(base: Checkpoint) -> bool:
    """Return True for a base whose weights are computed as they were quantised at training."""
    return any(
        isinstance(ref, ComputedRef) and isinstance(ref.source, SimulatedWeight) for ref in base.tensors.values()
    )


def evidence_of_training(adapter: Adapter, base: Checkpoint | None, trained_on: str | None) -> str:
    """Return what is known of the quantisation of the base at training, as a phrase."""
    if trained_on is not None:
        return f"{trained_on}, as stated"
    schemes = sorted({weight.scheme for weight in packed_weights(base).values()}) if base is not None else []
    if schemes:
        return f"assumed to be this base: {', '.join(schemes)}"
    if str(adapter.base_name).rstrip("/").endswith(FOUR_BIT_NAMES):
        return f"a 4-bit base, by its name {adapter.base_name}: see --trained-on nf4-double"
    return "not stated; assumed to be the base as it is stored"


def is_unstated_4bit(adapter: Adapter, base: Checkpoint, trained_on: str | None) -> bool:
    """Return True where the adapter names a 4-bit base, the given base is not, and the user states nothing."""
    named = str(adapter.base_name).rstrip("/").endswith(FOUR_BIT_NAMES)
    return named and trained_on is None and base.stored is None


def _quantised_names(base: Checkpoint) -> set[str]:
    """Return the stored weights that transformers' bitsandbytes quantiser replaces (replace_with_bnb_linear)."""
    model = _build_model(base)
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = get_keys_to_not_convert(model)
    names, problems = set(), []
    for path, module in model.named_modules():
        if not should_convert_module(path, skipped):
            continue
        if type(module).__name__ == "Conv1D":
            problems.append(Problem(f"{path}: bitsandbytes quantises a Conv1D transposed, which is not supported"))
        if type(module) is not nn.Linear:
            continue
        name = f"{path}.weight"
        ref = base.tensors.get(name)
        if ref is None or ref.shape != tuple(module.weight.shape) or ref.dtype not in FLOAT_DTYPES:
            stored_form = "no such tensor" if ref is None else f"{ref.dtype} {ref.shape}"
            problems.append(Problem(f"{name}: the base stores this layer in another form", got=stored_form))
        names.add(name)
    raise_all(problems[:10], UnsupportedError)
    return names


def _build_model(base: Checkpoint) -> Any:
    """Return the base's transformers model on the meta device. Raises InputError without its class in the config."""
    architectures = base.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or "model_type" not in base.config:
        raise InputError(
            f"{base.folder / 'config.json'}: --trained-on needs the model's class to know its linear layers",
            expected="architectures and model_type",
        )
    try:
        model = build_model(base, str(architectures[0]))
    except ImportError as error:
        raise MissingDependencyError("--trained-on needs transformers", hint=install_command("verify")) from error
    if model is None:
        raise UnsupportedError(f"{base.folder}: transformers has no class {architectures[0]} for --trained-on")
    return model
