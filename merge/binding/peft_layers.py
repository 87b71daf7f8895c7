"""Binding of modules that PEFT's own layer computes: one nn.Linear each, its weight and, where it has one, its bias."""

from __future__ import annotations

from dataclasses import replace

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.peft_layer import PeftLayerModule, with_companions
from adapter_merge.quantisation.detection import CONV1D_MODELS
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef

from .bound import BoundModule
from .embeddings import EMBEDDINGS
from .weight_names import Renaming, find_places


def bind_layer(
    module: PeftLayerModule, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> list[BoundModule] | Problem:
    """Bind one layer to its stored weight and bias, or return the problem."""
    weight = _find_whole_tensor(f"{module.name}.weight", 2, module, rename)
    if isinstance(weight, Problem):
        return weight
    if adapter.fan_in_fan_out or base.config.get("model_type") in CONV1D_MODELS:
        return Problem(f"{module.name}: {module.kind} is supported on nn.Linear, not on Conv1D, which stores (in, out)")
    if weight.name.endswith(EMBEDDINGS):
        return Problem(f"{module.name}: {module.kind} is supported on nn.Linear, not on an embedding", got=weight.name)
    rows, columns = weight.shape
    name = f"{module.name}.bias"
    has_bias = any(form in rename.tensors for form in rename.spellings(name))
    bias = _find_whole_tensor(name, 1, module, rename) if has_bias or "weight" not in module.changes else None
    if isinstance(bias, Problem):
        return bias
    bound = []
    if "weight" in module.changes:
        bound.append(BoundModule(replace(module, parameter="weight", shape=(rows, columns), partner=bias), weight))
    if "bias" in module.changes and bias is not None:
        bound.append(BoundModule(replace(module, parameter="bias", shape=(1, rows), partner=weight), bias))
    return bound


def _find_whole_tensor(name: str, dimensions: int, module: PeftLayerModule, rename: Renaming) -> TensorRef | Problem:
    """Return the stored tensor of a parameter that the base stores as it is, or the problem."""
    stored = find_places(name, module.shape, rename)
    if not stored:
        return Problem(f"the base has no {name.rpartition('.')[2]} for {module.name}", rename(name))
    ref = stored[0].ref
    if len(stored) > 1 or not stored[0].is_whole or stored[0].turned:
        return Problem(
            f"{module.name}: was trained on a weight that this base stores in another layout",
            f"{name} in a tensor of its own",
            ref.name,
            f"{module.kind} needs the base in the layout that it was trained in",
        )
    if len(ref.shape) != dimensions:
        return Problem(f"{name}: {module.kind} is supported on nn.Linear", f"{dimensions} dimensions", str(ref.shape))
    if ref.dtype not in FLOAT_DTYPES:
        return Problem(f"{ref.name}: the base's weight is quantised", "/".join(FLOAT_DTYPES), ref.dtype)
    return ref


def set_companions(modules: list[BoundModule]) -> list[BoundModule]:
    """Give every layer the sizes of all adapted weights: some types share tensors that have the largest size."""
    shapes = {
        item.module.shape
        for item in modules
        if isinstance(item.module, PeftLayerModule) and item.module.parameter == "weight"
    }
    return [
        replace(item, module=with_companions(item.module, tuple(sorted(shapes))))
        if isinstance(item.module, PeftLayerModule) and item.module.drawn
        else item
        for item in modules
    ]
