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
from adapter_merge.quantisation.transposed_cache import TurnedCache
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

from .transformers_names import model_of

FOUR_BIT_NAMES = ("-bnb-4bit", "-unsloth-bnb-4bit")  # how hub names of bases in bitsandbytes' nf4 end


def open_trained_base(folder: str | Path, trained_on: str | None = None) -> Checkpoint:
    """Open the base in `folder`; where `trained_on` states a quantisation, as it was at training. No weight is read.

    Every linear layer that transformers hands to bitsandbytes becomes deq(q(W)), also those that no adapter changes.
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
            hint="leave it out: the adapter is merged into this base's own values",
        )
    return simulated_view(base, settings)


def simulated_view(base: Checkpoint, settings: TrainedOn) -> Checkpoint:
    """Return `base` with deq(q(W)) in the place of every weight that bitsandbytes quantises."""
    names = _quantised_names(base)
    kept = TurnedCache()
    shards = []
    for shard in base.shards:
        tensors = tuple(
            SimulatedWeight(ref, settings, kept).as_ref() if ref.name in names else ref for ref in shard.tensors
        )
        shards.append(replace(shard, tensors=tensors, is_whole=shard.is_whole and tensors == shard.tensors))
    note = f"{len(names)} weights are those that the adapter was trained on, {settings}, not the stored ones"
    return replace(base, shards=tuple(shards), stored=base, notes=(note,))


def is_simulated(base: Checkpoint) -> bool:
    """Return True for a base with weights as they were quantised at training."""
    return any(
        isinstance(ref, ComputedRef) and isinstance(ref.source, SimulatedWeight) for ref in base.tensors.values()
    )


def evidence_of_training(adapter: Adapter, base: Checkpoint | None, trained_on: str | None) -> str:
    """Return what is known of the base that the adapter was trained on, as a sentence without its end."""
    if trained_on is not None:
        return f"{trained_on}, as stated"
    schemes = sorted({weight.scheme for weight in packed_weights(base).values()}) if base is not None else []
    if schemes:
        return f"taken to be this base: {', '.join(schemes)}"
    if str(adapter.base_name).rstrip("/").endswith(FOUR_BIT_NAMES):
        return f"a 4-bit base, by its name {adapter.base_name}: see --trained-on nf4-double"
    return "not stated; taken to be the base as it is stored"


def is_unstated_4bit(adapter: Adapter, base: Checkpoint, trained_on: str | None) -> bool:
    """Return True where the adapter names a 4-bit base, the given one is not quantised, and nothing is stated."""
    named = str(adapter.base_name).rstrip("/").endswith(FOUR_BIT_NAMES)
    return named and trained_on is None and base.stored is None


def _quantised_names(base: Checkpoint) -> set[str]:
    """Return the stored weights that transformers' bitsandbytes quantiser replaces (replace_with_bnb_linear)."""
    model = _model(base)
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = get_keys_to_not_convert(model)
    names, problems = set(), []
    for path, module in model.named_modules():
        if not should_convert_module(path, skipped):
            continue
        if type(module).__name__ == "Conv1D":
            problems.append(Problem(f"{path}: bitsandbytes quantises a Conv1D transposed, which is not read here"))
        if type(module) is not nn.Linear:
            continue
        name = f"{path}.weight"
        ref = base.tensors.get(name)
        if ref is None or ref.shape != tuple(module.weight.shape) or ref.dtype not in FLOAT_DTYPES:
            got = "no such tensor" if ref is None else f"{ref.dtype} {ref.shape}"
            problems.append(Problem(f"{name}: the base stores this layer in another form", got=got))
        names.add(name)
    raise_all(problems[:10], UnsupportedError)
    return names


def _model(base: Checkpoint) -> Any:
    architectures = base.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or "model_type" not in base.config:
        raise InputError(
            f"{base.folder / 'config.json'}: --trained-on needs the model's class to know its linear layers",
            expected="architectures and model_type",
        )
    try:
        model = model_of(base, str(architectures[0]))
    except ImportError as error:
        raise MissingDependencyError("--trained-on needs transformers", hint=install_command("verify")) from error
    if model is None:
        raise UnsupportedError(f"{base.folder}: transformers has no class {architectures[0]} for --trained-on")
    return model
