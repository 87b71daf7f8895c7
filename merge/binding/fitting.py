"""Binding of one module to its stored weight: place, orientation and size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.methods.adapter import AdaptedModule, Adapter
from adapter_merge.methods.lora import BiasModule, LoraModule, RowSliceModule, StackModule
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.methods.vera import VeraModule
from adapter_merge.quantisation.detection import CONV1D_MODELS as CONV1D_MODELS
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES
from adapter_merge.storage.tensor_comparison import same_but_for_rounding

from .bound import BoundModule
from .convolutions import CONVOLVED
from .embeddings import EMBEDDINGS, TIED_HEADS, is_tied, text_config
from .experts import INPUT_FIRST, bind_stack
from .peft_layers import bind_layer
from .weight_names import Place, Renaming, find_places


def bind_module(
    module: AdaptedModule, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> list[BoundModule] | Problem:
    """Bind one module to the stored weight or weights that hold it, or return the problem."""
    if isinstance(module, StackModule):
        return bind_stack(module, adapter, base, rename)
    if isinstance(module, PeftLayerModule):
        return bind_layer(module, adapter, base, rename)
    name = f"{module.name}.{module.parameter}"
    kind = base.config.get("model_type")
    conv1d = adapter.fan_in_fan_out or kind in CONV1D_MODELS
    stored = find_places(name, module.shape, rename)
    if adapter.fan_in_fan_out and kind not in CONV1D_MODELS and _is_square(module, stored):
        # PEFT decides by the layer's type: on an nn.Linear it warns and ignores fan_in_fan_out.
        if kind is None or "auto_map" in base.config:
            return Problem(
                f"{module.name}: fan_in_fan_out is set, and it is unknown whether its square weight is (in, out)",
                "a model type of transformers, or fan_in_fan_out unset for an nn.Linear",
                f"model_type {kind!r}",
                "PEFT transposes a Conv1D, never an nn.Linear: set fan_in_fan_out accordingly in adapter_config.json",
            )
        conv1d = False
    saved_weight = adapter.base_layers.get(name)
    output = None
    if not stored and rename(name).endswith(TIED_HEADS) and is_tied(base):
        ref = next((base.tensors[key] for key in base.tensors if key.endswith(EMBEDDINGS)), None)
        if ref is not None:
            stored, output = (Place(ref),), rename(name)
    if not stored:
        failure = rename.mapped.failures.get(rename.mapped.parameter(name) or "") if rename.mapped is not None else None
        return Problem(f"the base has no {module.parameter} for {module.name}", rename(name), failure)
    in_stack = any(place.rows is not None and len(place.ref.shape) == 3 for place in stored)
    if in_stack and text_config(base.config).get("model_type") in INPUT_FIRST:
        return Problem(
            f"{module.name}: the base stores its experts as (experts, in, out): an adapter of one expert does not fit",
            hint="train it with target_parameters",
        )
    if saved_weight is not None and stored[0].is_whole and not same_but_for_rounding(saved_weight, stored[0].ref):
        # PEFT loads the weight that the adapter's file holds: it was resized, or changed, before the training.
        tied_to = stored[0].ref.name if output is not None else None
        if tied_to is not None and saved_weight.shape == stored[0].ref.shape:
            return Problem(
                f"{name}: the adapter's file holds another weight than the base's, and {tied_to} is tied to it",
                hint="give the base of the training, or untie the head in it (tie_word_embeddings false)",
            )
        if saved_weight.dtype != stored[0].ref.dtype and saved_weight.shape == stored[0].ref.shape:
            return Problem(
                f"{name}: the adapter's file holds another weight than the base's, in another dtype",
                stored[0].ref.dtype,
                saved_weight.dtype,
                "give the base of the training",
            )
        output, stored = output or stored[0].ref.name, (Place(saved_weight),)
    bound = []
    for place in stored:
        fitted = _fit(module, place, conv1d, output)
        if isinstance(fitted, Problem):
            return fitted
        bound.append(fitted)
    return bound


def _is_square(module: AdaptedModule, stored: tuple[Place, ...]) -> bool:
    """Return True for a weight whose orientation its shape does not show; VeRA's tensors do not hold the width."""
    if isinstance(module, VeraModule):
        return bool(stored) and set(stored[0].ref.shape) == {module.shape[0]}
    return module.shape[0] == module.shape[1]


def _fit(module: AdaptedModule, place: Place, conv1d: bool, output: str | None) -> BoundModule | Problem:
    """Bind one module to one place, or return the problem; `conv1d`: the base stores (in, out)."""
    ref = place.ref
    if ref.dtype not in FLOAT_DTYPES:
        return Problem(f"{ref.name}: the base's weight is quantised", "/".join(FLOAT_DTYPES), ref.dtype,
                       "merge into the unquantised base, then quantise")  # fmt: skip
    wrong = Problem(f"{module.name}: the adapter's shape is not the weight's", str(ref.shape), str(module.shape))
    if isinstance(module, BiasModule):
        return BoundModule(module, ref, output=output) if ref.shape == module.shape[1:] else wrong
    if isinstance(module, TokenModule):
        if len(ref.shape) != 2 or ref.shape[1] != module.shape[1]:
            return wrong
        if max(module.indices, default=0) >= ref.shape[0]:
            return Problem(f"{module.name}: a trained token is outside the embedding",
                           f"rows below {ref.shape[0]}", str(max(module.indices)))  # fmt: skip
        return BoundModule(module, ref, output=output)
    if not place.is_whole:
        if isinstance(module, LoraModule) and (module.initial is not None or module.magnitude_dim == 1):
            return Problem(
                f"{module.name}: was trained on a weight that this base stores in another layout",
                hint="PiSSA, OLoRA and DuDe need the base as it was trained on",
            )
        if place.part is not None:
            if not isinstance(module, LoraModule):
                return Problem(f"{module.name}: only LoRA can be split over several weights")
            return BoundModule(RowSliceModule(module, *place.part), ref, rows=place.rows)
        return BoundModule(module, ref, rows=place.rows)
    if isinstance(module, VeraModule):
        if len(ref.shape) != 2 or module.shape[0] not in ref.shape:
            return wrong
        turned = conv1d and ref.shape[1] == module.shape[0]
        if not turned and ref.shape[0] != module.shape[0]:
            return wrong
        return BoundModule(replace(module, inner=ref.shape[0 if turned else 1]), ref, turned, output)
    embedding = isinstance(module, LoraModule) and module.embedding
    shape = module.shape
    if isinstance(module, CONVOLVED):
        if isinstance(module, LoraModule) and not _same_kernel(module.kernel, ref.shape[2:]):
            return wrong
        if len(ref.shape) > 2 and ref.as_matrix().shape == shape:
            return BoundModule(module, ref.as_matrix(), output=output)
    if place.turned:
        return BoundModule(module, ref, True, output) if ref.shape == shape[::-1] and not conv1d else wrong
    straight, turned = ref.shape == shape, ref.shape == shape[::-1]
    if straight and turned:
        return BoundModule(module, ref, conv1d and not embedding, output)
    if straight:
        return BoundModule(module, ref, False, output)
    if turned and not embedding and conv1d:
        return BoundModule(module, ref, True, output)
    return wrong


def _same_kernel(adapted: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Return True for equal kernels; a linear layer and a convolution of one place count as equal."""
    return adapted == stored or (set(adapted) <= {1} and set(stored) <= {1})


def set_vera_sizes(modules: list[BoundModule]) -> list[BoundModule]:
    """Set the size of VeRA's shared matrices, that of the largest adapted weight. Raises MismatchError if too small."""
    vera = [item.module for item in modules if isinstance(item.module, VeraModule)]
    if not vera:
        return modules
    sizes = (max(m.shape[0] for m in vera), max(m.shape[1] for m in vera))
    problems = []
    a, b = vera[0].projections.a, vera[0].projections.b
    if a is not None and b is not None and (a.shape[1] < sizes[1] or b.shape[0] < sizes[0]):
        problems.append(
            Problem("VeRA's shared matrices are smaller than the weights", str(sizes), f"A {a.shape}, B {b.shape}")
        )
    raise_all(problems, MismatchError)
    return [
        replace(item, module=replace(item.module, projections=replace(item.module.projections, sizes=sizes)))
        if isinstance(item.module, VeraModule)
        else item
        for item in modules
    ]


def check_overlaps(modules: Iterable[BoundModule]) -> list[Problem]:
    """Return a problem for each weight of which two modules of one adapter change the same rows."""
    row_ranges: dict[str, list[tuple[float, float, bool]]] = {}
    problems = []
    for item in modules:
        first, stop = item.rows or (0, float("inf"))
        is_tokens = isinstance(item.module, TokenModule)
        for begin, end, other_is_tokens in row_ranges.get(item.name, ()):
            if first < end and begin < stop and is_tokens == other_is_tokens:
                problems.append(Problem(f"{item.name} is adapted twice by one adapter"))
                break
        row_ranges.setdefault(item.name, []).append((first, stop, is_tokens))
    return problems
