"""Inputs of a factorisation: opening and binding of the adapter, and checks that low-rank factors can express it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.binding.convolutions import convolution_layers, kernel_of
from adapter_merge.binding.positional import SHARED, adapted_queries, is_positional
from adapter_merge.binding.trained_base import open_trained_base
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.combined_weight import CombinedWeight
from adapter_merge.combine.open_inputs import AdapterInput, open_pair
from adapter_merge.combine.origin import bind_checked
from adapter_merge.combine.recipe import Recipe
from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import BiasModule, ExpertModule, LoraModule, RowSliceModule, StackModule
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.checkpoint import Checkpoint

from .expert_factors import is_of_stack

SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of a module that belongs to one expert
MaybeBoundModule = tuple[AdaptedModule, BoundModule | None]


def open_factored(
    base: str | Path | None, adapter: AdapterInput, base_kind: str | None, options: ReadOptions | None
) -> tuple[Adapter, BoundAdapter | None]:
    """Open the adapter, and bind it where there is a base: `base`, the recipe's, or the adapter's own (DCFT)."""
    if isinstance(adapter, Recipe):
        bound = open_pair(base, adapter)
        return bound.adapter, bound
    trained_on = options.trained_on if options is not None else None
    checkpoint = open_trained_base(base, trained_on) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    require_names(opened, checkpoint)
    weights = checkpoint or opened.own_base
    return opened, None if weights is None else bind_checked(opened, weights, base_kind)


def warn_unproved_heads(opened: Adapter, base: str | Path | None) -> list[str]:
    """Return a warning where tensors of a DCFT checkpoint count as trained because there is no base to compare."""
    if base is not None or opened.own_base is None or not opened.replacements:
        return []
    size = sum(ref.nbytes for ref in opened.replacements.values()) / 1e6
    names = ", ".join(sorted(opened.replacements)[:4])
    return [
        f"{names}: not part of the adapted layers; without BASE it is unknown whether they were trained, so all are "
        f"copied as full tensors ({size:.1f} MB). With BASE, tensors that equal those of the base are omitted"
    ]


def check_supported(pairs: Sequence[MaybeBoundModule], exact: bool, experts: bool = False) -> None:
    """Check that the modules have low-rank factors. experts: the adapter has those of experts beside `pairs`.

    Raises UnsupportedError for modules that have no low-rank factors (the first ten), InputError for a
    combination of full rank where exact factors are requested.
    """
    if not pairs and not experts:
        raise UnsupportedError(
            "the adapter holds only full trained tensors, which have no factors", hint="merge this adapter instead"
        )
    problems = []
    full_rank = [module for module, _ in pairs if isinstance(module, CombinedWeight) and not module.has_form]
    if exact and full_rank:
        first = full_rank[0]
        how = "adapters in turn are" if first.in_turn else f"a {first.settings.method} combination is"
        if first.is_linear:
            how = "a combination with scales of input columns is"
        raise InputError(f"{first.name}: {how} of full rank", expected="--rank R or ENERGY, which truncates")
    layers = [module for module, _ in pairs if isinstance(module, PeftLayerModule) and module.low_rank is None]
    if exact and layers:
        raise InputError(
            f"{layers[0].name}: {layers[0].kind} is merged by PEFT's own layer and has no exact low-rank factors",
            expected="--rank R or ENERGY, which truncates",
        )
    counts = Counter(module.name for module, _ in pairs)
    for module, _ in pairs:
        reason = None
        if isinstance(module, BiasModule):
            reason = "a trained bias inside lora_B"
        elif isinstance(module, PeftLayerModule) and module.parameter == "bias":
            reason = f"{module.kind} changes the bias as well"
        elif isinstance(module, TokenModule):
            reason = "trained tokens replace rows of an embedding"
        elif isinstance(module, ExpertModule | StackModule):
            reason = "adapted experts of a stacked parameter"
        elif isinstance(module, RowSliceModule):
            reason = "one magnitude for a weight that this base stores as several"
        elif counts[module.name] > 1:
            reason = "adapted more than once"
        if reason is not None:
            problems.append(
                Problem(f"{module.name}: has no low-rank factors: {reason}", hint="merge this adapter instead")
            )
    raise_all(problems[:10], UnsupportedError)


def check_positional_queries(opened: Adapter, bound: BoundAdapter | None, frozen_positions: bool) -> None:
    """Check that a LoRA expresses a DCFT of DeBERTa, whose positional queries keep the frozen weight of query_proj.

    frozen_positions: the reader of the factors keeps the positional queries frozen, so that the factors are
    correct. Raises UnsupportedError for a base with shared query weights, InputError where the base is needed for this
    check.
    """
    if bound is None:
        queries = adapted_queries(opened)
        if queries:
            raise InputError(
                f"{queries[0]}: on a DeBERTa with {SHARED}, a LoRA with its factors would be a different adapter",
                expected=f"BASE, whose config states whether it has {SHARED}",
            )
    elif SHARED in bound.config_changes and not frozen_positions:
        raise UnsupportedError(
            f"{bound.base.folder}: its query_proj projects tokens and positions ({SHARED}); DCFT adapts only "
            "the former, a LoRA of query_proj adapts both",
            expected=f"a base without {SHARED}",
            hint="merge this adapter (the merged model has separate projections), or export it to ONNX",
        )


def needs_base(module: AdaptedModule) -> bool:
    """Tell whether the module's factors depend on the base's weight."""
    magnitude = module.magnitude is not None or module.own_magnitude
    return module.needs_base or magnitude


def pairs_of(opened: Adapter, bound: BoundAdapter | None) -> list[MaybeBoundModule]:
    """Return every adapted module with its bound weight, or with None where there is no base.

    Experts of target_parameters are left out where there is a base (expert_factors.py). A plain LoRA on a weight that
    the base stores in several parts (a fused qkv) has None as well: its factors do not depend on them.
    """
    if bound is None:
        return [(module, None) for module in opened.modules]
    if isinstance(bound, CombinedBound):
        return [(item.combination, item) for item in bound.factor_modules()]
    pairs: dict[int, MaybeBoundModule] = {}
    for item in bound.modules:
        module = item.module
        if is_positional(item) or is_of_stack(module, opened):
            continue
        if isinstance(module, RowSliceModule) and module.whole.magnitude is None:
            pairs[id(module.whole)] = (module.whole, None)
        else:
            pairs[id(item)] = (module, item)
    return list(pairs.values())


def has_experts(opened: Adapter) -> bool:
    """Tell whether the adapter adapts parameters by PEFT's target_parameters."""
    return any(isinstance(module, StackModule) for module in opened.modules)


def check_experts(
    opened: Adapter, pairs: Sequence[MaybeBoundModule], bound: BoundAdapter | None, exact_folder: bool
) -> None:
    """Check that PEFT's target_parameters express the adapter's experts.

    exact_folder: exact factors are written, as a PEFT folder. Raises InputError without a base, UnsupportedError for
    truncated factors, other formats, and row scales, which PEFT has not beside target_parameters.
    """
    if bound is None:
        raise InputError(
            f"{opened.folder}: adapts experts, whose number the base tells",
            expected="BASE and ADAPTER",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    if not exact_folder:
        raise UnsupportedError(
            f"{opened.folder}: adapts experts, whose factors are written exactly and as a PEFT folder only",
            expected="neither --rank nor --budget nor --format gguf",
            hint="merge this adapter instead",
        )
    scaled = [module.name for module, _ in pairs if module.magnitude is not None or module.own_magnitude]
    if scaled:
        raise UnsupportedError(
            f"{scaled[0]}: has a row scale (DoRA), which a PEFT folder with target_parameters for experts cannot have",
            hint="merge this adapter instead",
        )


def check_single_experts(pairs: Sequence[MaybeBoundModule], keeps_scale: bool) -> None:
    """Raise UnsupportedError for experts, trained as a module each, whose factors have a row scale.

    transformers 5 stacks them, PEFT's target_parameters have no DoRA, and vLLM adapts experts by plain LoRA alone.
    """
    for module, _ in pairs:
        if keeps_scale and SINGLE_EXPERT.search(module.name) and (module.magnitude is not None or module.own_magnitude):
            raise UnsupportedError(
                f"{module.name}: an expert with a row scale (DoRA, DuDe) has no exact factors that anything loads",
                expected="a plain LoRA, which alone PEFT's target_parameters and vLLM's experts are",
                hint="merge this adapter, or truncate it to a plain LoRA with --rank",
            )


def check_convolutions(opened: Adapter, pairs: Sequence[MaybeBoundModule], bound: BoundAdapter | None) -> None:
    """Check that a LoRA of PEFT expresses the factors of every adapted convolution, which must not be grouped.

    PEFT's A of a grouped convolution reads all input channels: (R, in, k, ...) beside a weight (out, in / groups, k,
    ...). Raises UnsupportedError for a grouped convolution, and where the model's class is needed and cannot be built;
    InputError for a LoHa or LoKr without the base, which alone has the kernel.
    """
    if bound is None:
        flat = [module.name for module, _ in pairs if isinstance(module, LohaModule | LokrModule)]
        if flat:
            raise InputError(
                f"{flat[0]}: its factors cannot be written without the base",
                expected="BASE, whose weights tell convolutions from linear layers",
            )
        return
    items = [item for _, item in pairs if item is not None and kernel_of(item, bound.base)]
    layers, unknown = convolution_layers(items, bound.base, opened.config)
    trained_here = opened.format in (AdapterFormat.PEFT, AdapterFormat.DIFFUSERS)
    problems = []
    for item in items:
        layer = layers.get(item.module.name)
        if layer is None and not (trained_here and isinstance(item.module, LoraModule)):  # PEFT's tells by its shapes
            cause = f"{item.module.name}: it is unknown whether this convolution is grouped"
            problems.append(Problem(cause, "a model class of transformers or diffusers", unknown or None))
        elif layer is not None and layer.groups > 1:
            problems.append(
                Problem(
                    f"{item.module.name}: has no LoRA factors: the convolution has {layer.groups} groups, in each of "
                    "which PEFT's LoRA reads all input channels",
                    hint="merge this adapter instead",
                )
            )
    raise_all(problems[:10], UnsupportedError)


def kernels_of(pairs: Sequence[MaybeBoundModule], bound: BoundAdapter | None) -> dict[str, tuple[int, ...]]:
    """Return the kernel of every adapted convolution by its module: the base's, or without it that of a LoRA."""
    kernels = {}
    for module, item in pairs:
        own = module.kernel if isinstance(module, LoraModule) else ()
        kernels[module.name] = own if item is None or bound is None else kernel_of(item, bound.base)
    return {name: kernel for name, kernel in kernels.items() if kernel}


def require_names(opened: Adapter, base: Checkpoint | None) -> None:
    """Raise InputError where module names have underscores instead of dots, and no base resolves them."""
    flat = [module.name for module in opened.modules if "." not in module.name and "_" in module.name]
    if flat and base is None and opened.format == AdapterFormat.KOHYA:
        raise InputError(
            f"{opened.folder}: the file writes the dots of its modules' names as underscores",
            expected="BASE, whose names show which underscores are dots",
            got=flat[0],
        )
