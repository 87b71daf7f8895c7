"""What a factorisation begins with: the adapter, bound where there is a base, and what no factors can say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adapter_merge.binding.bind import BoundAdapter, BoundModule, bind
from adapter_merge.binding.positional import SHARED, adapted_queries, is_positional
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.combined_weight import CombinedWeight
from adapter_merge.combine.open_inputs import AdapterInput, open_pair
from adapter_merge.combine.recipe import Recipe
from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.detection import ReadOptions, open_adapter
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat
from adapter_merge.methods.lora import BiasModule, ExpertModule, PartModule, StackModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.checkpoint import Checkpoint, open_checkpoint

Pair = tuple[AdaptedModule, BoundModule | None]


def open_factored(
    base: str | Path | None, adapter: AdapterInput, base_kind: str | None, options: ReadOptions | None
) -> tuple[Adapter, BoundAdapter | None]:
    """The adapter, and how it is bound where there is a base: its own (DCFT reference), the recipe's or `base`."""
    if isinstance(adapter, Recipe):
        bound = open_pair(base, adapter)
        return bound.adapter, bound
    checkpoint = open_checkpoint(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    require_names(opened, checkpoint)
    held = checkpoint or opened.own_base
    return opened, None if held is None else bind(opened, held, base_kind)


def unproved_heads(opened: Adapter, base: str | Path | None) -> list[str]:
    """A warning where a DCFT checkpoint's tensors count as trained only because nothing says that they are not."""
    if base is not None or opened.own_base is None or not opened.replacements:
        return []
    size = sum(ref.nbytes for ref in opened.replacements.values()) / 1e6
    names = ", ".join(sorted(opened.replacements)[:4])
    return [
        f"{names}: stand outside the adapted layers, and without BASE nothing tells whether they were trained: all are "
        f"carried over whole ({size:.1f} MB). Pass BASE, and what equals the base's is left out"
    ]


def check_supported(pairs: Sequence[Pair], exact: bool) -> None:
    """Refuse what only a merge can do, all of it at once."""
    problems = []
    full = [module for module, _ in pairs if isinstance(module, CombinedWeight) and not module.has_form]
    if exact and full:
        how = "adapters in turn are" if full[0].in_turn else f"a {full[0].settings.method} combination is"
        if full[0].is_linear:
            how = "a combination with scales of input columns is"
        raise InputError(f"{full[0].name}: {how} of full rank", expected="--rank R or ENERGY, which truncates")
    counts = Counter(module.name for module, _ in pairs)
    for module, _ in pairs:
        reason = None
        if isinstance(module, BiasModule):
            reason = "a trained bias inside lora_B"
        elif isinstance(module, TokenModule):
            reason = "trained tokens are rows of an embedding replaced"
        elif isinstance(module, ExpertModule | StackModule):
            reason = "adapted experts of a stacked parameter"
        elif isinstance(module, PartModule):
            reason = "a magnitude over a weight that this base keeps in several"
        elif counts[module.name] > 1:
            reason = "adapted more than once"
        if reason is not None:
            problems.append(
                Problem(f"{module.name}: no low-rank factors say this: {reason}", hint="merge this adapter instead")
            )
    raise_all(problems[:10], UnsupportedError)


def check_positional_queries(opened: Adapter, bound: BoundAdapter | None, frozen_positions: bool) -> None:
    """Refuse the factors of a DCFT whose positional queries keep the frozen weight: a LoRA adapts both uses.

    frozen_positions: whoever reads the factors keeps them frozen. Raises UnsupportedError, and InputError where only
    the base tells.
    """
    if bound is None:
        queries = adapted_queries(opened)
        if queries:
            raise InputError(
                f"{queries[0]}: on a DeBERTa with {SHARED} its factors would be another adapter",
                expected="BASE, whose config says whether it has it",
            )
    elif SHARED in bound.config_changes and not frozen_positions:
        raise UnsupportedError(
            f"{bound.base.folder}: its query_proj projects tokens and positions ({SHARED}), and DCFT adapts the former "
            "alone; a LoRA of query_proj adapts both",
            expected="a base without it",
            hint="merge this adapter (the merged model gets projections of its own), or export it to ONNX",
        )


def needs_base(module: AdaptedModule) -> bool:
    """True when the module's factors cannot be found without the base's weight."""
    magnitude = module.magnitude is not None or module.own_magnitude
    return module.needs_base or magnitude


def pairs_of(opened: Adapter, bound: BoundAdapter | None) -> list[Pair]:
    """Every adapted module, with its weight where there is a base.

    A plain LoRA on a weight that the base keeps in several parts (a fused qkv) needs none of them.
    """
    if bound is None:
        return [(module, None) for module in opened.modules]
    if isinstance(bound, CombinedBound):
        return [(item.combination, item) for item in bound.factor_modules()]
    pairs: dict[int, Pair] = {}
    for item in bound.modules:
        module = item.module
        if is_positional(item):
            continue
        if isinstance(module, PartModule) and module.whole.magnitude is None:
            pairs[id(module.whole)] = (module.whole, None)
        else:
            pairs[id(item)] = (module, item)
    return list(pairs.values())


def require_names(opened: Adapter, base: Checkpoint | None) -> None:
    """A file that writes the dots of its modules' names as underscores needs a base to tell them apart."""
    flat = [module.name for module in opened.modules if "." not in module.name and "_" in module.name]
    if flat and base is None and opened.format == AdapterFormat.KOHYA:
        raise InputError(
            f"{opened.folder}: the file writes the dots of its modules' names as underscores",
            expected="a BASE, which tells where the dots were",
            got=flat[0],
        )
