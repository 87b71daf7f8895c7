"""Binding of an adapter to its base: finds the weight of every module and the tensor of every replacement.

bound.py               the result: BoundModule, BoundAdapter
weight_names.py        names and places of weights in the checkpoint: prefixes, fused projections
transformers_names.py  names and places by transformers' mapping between hub names and the model's names
fitting.py             binding of one module to its stored weight: shape, orientation
replacements.py        tensors that were trained in full, and the stored tensors that they replace
peft_layers.py         modules that PEFT's own layer computes
convolutions.py        the model's layers of adapted convolutions: groups, dilation, padding
experts.py             experts, stacked in one tensor or stored as one tensor each
embeddings.py          embeddings and heads: tied or resized, and the config after the merge
positional.py          DeBERTa: the weights of positional queries and keys after DCFT
base_kind.py           PiSSA, OLoRA, DuDe: the original base or the residual
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from adapter_merge.errors import MismatchError, Problem, UnsupportedError, raise_all
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.lora import BiasModule, StackModule
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.methods.vera import VeraModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

from .base_kind import decide_base_kind
from .bound import BoundAdapter, BoundModule, Origin
from .convolutions import convolution_layers, unlike_weights
from .embeddings import TIED_HEADS, add_config_changes, text_config
from .fitting import bind_module, check_overlaps, set_vera_sizes
from .peft_layers import set_companions
from .positional import add_positional_projections
from .replacements import missing_replacements, place_replacement
from .transformers_names import list_transformers_names
from .weight_names import Renaming, find_renaming

log = logging.getLogger(__name__)

__all__ = ["BoundAdapter", "BoundModule", "bind"]

# Models whose checkpoints hold stacked experts transposed under the same name (transformers' mapping, Transpose).
TURNED_ON_DISK = ("qwen3_vl_moe",)
NAMES_HINT = "where the base's names differ from the model's, transformers' mapping is needed: pip install transformers"


def bind(adapter: Adapter, base: Checkpoint, base_kind: str | None = None) -> BoundAdapter:
    """Bind `adapter` to `base`. Raises MismatchError with every module or tensor that does not fit.

    Raises UnsupportedError for convolutions whose trained update is none of their weight.

    Names are used unchanged where the base has them all, else by transformers' mapping, else with one prefix.
    `base_kind` is "original" or "residual" for PiSSA and DuDe, None to decide by measurement (base_kind.py).
    """
    match = _find_best_match(adapter, base)
    problems = match.problems
    if problems:
        first = next(iter(base.tensors), "none")
        hint = (
            f"is {adapter.base_name or 'another model'} the base it was trained on? The base's names look like {first}"
        )
        count = len(adapter.modules) + len(adapter.replacements)
        share = f"{min(len(problems), count)} of its {count} tensors do not fit"
        cause = f"{adapter.folder}: the adapter does not belong to this base, {base.folder}: {share}"
        raise_all(problems, MismatchError, Problem(cause, hint=hint))
    layers, unknown = convolution_layers(match.modules, base, adapter.config)
    raise_all(unlike_weights(adapter, match.modules, layers), UnsupportedError)
    doubts = (f"dilation and padding of its convolutions were not compared ({unknown})",) if unknown else ()
    bound = BoundAdapter(
        adapter,
        base,
        tuple(set_companions(set_vera_sizes(match.modules))),
        match.replacements,
        "original",
        origin=Origin(doubts=doubts),
    )
    bound = decide_base_kind(add_positional_projections(add_config_changes(bound)), base_kind)
    log.info("%s: fits %s, used as the %s base", adapter.folder, base.folder, bound.base_kind)
    return bound


@dataclass
class Match:
    """The result of binding with one renaming: bound modules, replacements and problems."""

    modules: list[BoundModule] = field(default_factory=list)
    replacements: dict[str, TensorRef] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def _find_best_match(adapter: Adapter, base: Checkpoint) -> Match:
    """Return the match of the first renaming without a problem, else the one with the fewest problems."""
    if adapter.prefix is not None:
        return _bind_with(adapter, base, _find_renaming(adapter, base)[0])
    plain = _bind_with(adapter, base, Renaming(base.tensors))
    if adapter.own_base is not None or (
        not _may_be_transposed(adapter) and (not plain.problems or _has_all_names(adapter, base))
    ):
        return plain
    matches = []
    mapped, reason = list_transformers_names(base, adapter.config)
    for names in mapped:
        match = _bind_with(adapter, base, Renaming(base.tensors, mapped=names))
        if not match.problems:
            return match
        matches.append(match)
    if not plain.problems:
        if any(names.failures for names in mapped):
            return matches[0]
        plain.problems += _check_square_experts(base) if not mapped else []
        return plain
    rename, other_prefixes = _find_renaming(adapter, base)
    with_prefix = _bind_with(adapter, base, rename)
    if other_prefixes:
        with_prefix.problems.append(
            Problem(
                "the adapter fits several parts of the base",
                got=", ".join(repr(prefix) for prefix in (rename.prefix, *other_prefixes[:5])),
                hint="pass --prefix with the one that it was trained in",
            )
        )
    best = min([with_prefix, *matches], key=lambda match: len(match.problems))
    if best.problems and not mapped and reason:
        best.problems.append(
            Problem("the model's parameter names could not be compared with the base's", got=reason, hint=NAMES_HINT)
        )
    return best


def _bind_with(adapter: Adapter, base: Checkpoint, rename: Renaming) -> Match:
    """Bind every module and replacement with one renaming."""
    match = Match()
    for module in adapter.modules:
        bound = bind_module(module, adapter, base, rename)
        if isinstance(bound, Problem):
            match.problems.append(bound)
        else:
            match.modules += bound
    for name, ref in adapter.replacements.items():
        placed = place_replacement(name, ref, adapter, base, rename)
        if isinstance(placed, Problem):
            match.problems.append(placed)
        else:
            match.replacements |= placed
    match.problems += [*check_overlaps(match.modules), *missing_replacements(adapter, base)]
    return match


def _may_be_transposed(adapter: Adapter) -> bool:
    """Return True for stacks of square matrices, which some hub layouts hold transposed under the same name."""
    factors = [(module.b.shape[0], module.a.shape[1]) for module in adapter.modules if isinstance(module, StackModule)]
    stacks = [ref.shape[1:] for ref in adapter.replacements.values() if len(ref.shape) == 3]
    return any(rows == columns for rows, columns in (*factors, *stacks))


def _check_square_experts(base: Checkpoint) -> list[Problem]:
    """Return a problem where square experts may be stored transposed, and transformers' mapping is not available."""
    kind = text_config(base.config).get("model_type")
    if not any(name in str(kind) for name in TURNED_ON_DISK):
        return []
    return [
        Problem(
            f"{kind}: its hub layout holds experts transposed, which the shape of square experts does not show",
            hint=NAMES_HINT,
        )
    ]


def _has_all_names(adapter: Adapter, base: Checkpoint) -> bool:
    """Return True where the base has every name of the adapter, so that renaming cannot solve a problem."""
    names = [f"{module.name}.{module.parameter}" for module in adapter.modules]
    return all(name in base.tensors for name in (*names, *adapter.replacements))


def _find_renaming(adapter: Adapter, base: Checkpoint) -> tuple[Renaming, tuple[str, ...]]:
    """Return the renaming with one prefix that fits, and other prefixes that also fit."""
    names: list[tuple[str, tuple[int, int] | None]] = []
    for module in adapter.modules:
        if isinstance(module, StackModule):
            names.append((f"{module.name}.", None))
        elif isinstance(module, BiasModule | TokenModule | VeraModule | PeftLayerModule):
            names.append((f"{module.name}.{module.parameter}", None))
        else:
            names.append((f"{module.name}.{module.parameter}", module.shape))
    names.sort(key=lambda item: item[1] is None)
    if not names:
        names = [(name, None) for name in adapter.replacements]
    exempt = frozenset(name for name, _ in names if name.endswith(TIED_HEADS))
    resized = frozenset(name for name in adapter.base_layers)
    return find_renaming(names, base.tensors, exempt | resized, adapter.prefix)
