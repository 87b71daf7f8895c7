"""Streamed models of the base, of the adapter as trained, and of an artefact.

PEFT loads a PEFT folder into a model without weights. Once a part's weights are loaded, PEFT's own initialisation
subtracts the initial factors of PiSSA and OLoRA from them, in the dtype of the training. Other adapters run by the
forward of their method (forward_formulas.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.binding.convolutions import stored_weight
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.errors import UnsupportedError
from adapter_merge.formats.peft.tensors import REPLACEMENTS, find_weights
from adapter_merge.methods.adapter import AdapterFormat
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import Initial
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint, read_json, read_weights
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

from .deberta import use_authors_attention
from .forward_formulas import Forward, forward_of, subtracted_from
from .live_adapter import (
    adapted_model,
    live_layer,
    load_model,
    model_config,
    module_path,
    peft_config,
    quiet_libraries,
    require,
    with_heads,
)
from .opened_artefact import open_artefact
from .streamed_model import PartLoader, StreamedModel, skeleton, with_placeholders
from .tensor_sources import Source, base_sources, file_sources
from .whole_formulas import modules_by_tensor, whole_weight

# Methods whose layer PEFT computes from the values of the weight: their models are loaded as a whole.
BUILT_FROM_WEIGHTS = ("LN_TUNING", "OSF", "PSOFT")


def base_parts(base: Checkpoint, dtype: torch.dtype) -> PartLoader:
    """Return a loader of the base's weights."""
    return _loader(model_config(base.folder), base, dtype)


def formula_parts(bound: BoundAdapter, dtype: torch.dtype) -> PartLoader:
    """Return a loader of the weights W' with the adapter, which its method's formula computes when a part is loaded."""
    config = model_config(bound.base.folder)
    _set(config, bound.config_changes)
    sources = file_sources({**bound.copies, **bound.replacements}, dtype)
    for name, items in modules_by_tensor(bound).items():
        shape = stored_weight(items[0], bound.base).shape
        sources[name] = lambda items=items, shape=shape: whole_weight(items)[1].reshape(shape).to(dtype)  # type: ignore[misc]
    return _loader(config, bound.base, dtype, sources)


def streamed_base(base: Checkpoint, dtype: torch.dtype) -> StreamedModel:
    """Return the model of the base."""
    return _streamed(base_parts(base, dtype), dtype)


def _streamed(loader: PartLoader, dtype: torch.dtype) -> StreamedModel:
    return StreamedModel(with_placeholders(skeleton(loader.config, dtype)), loader)


def streamed_trained(bound: BoundAdapter, dtype: torch.dtype) -> StreamedModel:
    """Return the base with one live, unmerged adapter."""
    config = model_config(bound.base.folder)
    is_peft = bound.adapter.format == AdapterFormat.PEFT
    tensors: dict[str, TensorRef] = {}
    # A merge unties the shared projections of DCFT's attention; the training has them shared, see deberta.py.
    changes = {key: value for key, value in bound.config_changes.items() if key != "share_att_key"}
    if is_peft:
        changes.pop("tie_word_embeddings", None)  # PEFT trains a separate copy of the tied weight
    else:
        tensors |= {**bound.copies, **bound.replacements}
    known = {**bound.base.tensors, **tensors}
    tensors |= {
        item.weight.name: stored_weight(item, bound.base)
        for item in bound.modules
        if item.weight.name in known and stored_weight(item, bound.base) != known[item.weight.name]
    }
    # Weights of the base that PEFT saved beside the adapter: a tied head reads them too.
    tensors |= {item.name: item.weight for item in bound.modules if item.weight.name not in known}
    _set(config, changes)
    loader = _loader(config, bound.base, dtype, file_sources(tensors, dtype))
    if is_peft and bound.adapter.method in BUILT_FROM_WEIGHTS:
        return StreamedModel(adapted_model(bound, dtype, load_model(bound.base.folder)), loader)
    model = with_placeholders(skeleton(config, dtype))
    if not is_peft:
        return StreamedModel(model, loader, _replace_forwards(model, bound, dtype))
    live = with_heads(_in_peft(model, bound.adapter.folder, bound.base_kind), bound.replacements)
    return StreamedModel(live, loader, _residuals(live, bound, dtype))


def streamed_combination(bound: CombinedBound, dtype: torch.dtype) -> StreamedModel:
    """Return the base with the weights of a combination, which formulas compute when a part is loaded.

    A combination has no live form. live_probes.py compares the formula of each of its adapters with live layers.
    """
    return _streamed(formula_parts(bound, dtype), dtype)


def streamed_artefact(bound: BoundAdapter, folder: Path, kind: str, dtype: torch.dtype) -> StreamedModel:
    """Return the model of an artefact of any kind."""
    if kind == "merged model":
        return streamed_base(open_base(folder), dtype)
    if kind == "adapter":
        return streamed_trained(open_artefact(bound, folder, bound.base_kind), dtype)
    config = model_config(bound.base.folder)
    if kind == "factors" and not (folder / "adapter_config.json").is_file():  # a llama.cpp adapter
        return streamed_trained(open_artefact(bound, folder, bound.base_kind), dtype)
    if kind == "factors":
        heads = folder / REPLACEMENTS
        own = {ref.name: ref for ref in read_weights(heads).tensors} if heads.is_file() else {}
        live = with_heads(_in_peft(with_placeholders(skeleton(config, dtype)), folder, "original"), own)
        return StreamedModel(live, _loader(config, bound.base, dtype))
    _set(config, bound.config_changes)
    sources = file_sources({**bound.copies, **bound.replacements}, dtype)
    outputs = {item.name: stored_weight(item, bound.base) for item in bound.modules}
    for ref in read_weights(folder / "delta.safetensors").tensors:
        sources[ref.name] = _sum(outputs.get(ref.name, ref), ref, dtype)
    return StreamedModel(with_placeholders(skeleton(config, dtype)), _loader(config, bound.base, dtype, sources))


def held_model(streamed: StreamedModel) -> nn.Module:
    """Return the model with all of its weights in memory."""
    streamed.hold_all()
    return streamed.model


def _loader(
    config: Any, base: Checkpoint, dtype: torch.dtype, changed: Mapping[str, Source] | None = None
) -> PartLoader:
    """Return the loader of a model on `base`, with the tensors of `changed` in place of its own."""
    sources, quantiser = base_sources(base, dtype, changed)
    return PartLoader(config, sources, dtype, quantiser)


def _sum(base: TensorRef, delta: TensorRef, dtype: torch.dtype) -> Source:
    return lambda: read_tensor(base).to(dtype) + read_tensor(delta).to(dtype)


def _set(config: Any, changes: Any) -> None:
    for key, value in changes.items():
        setattr(config, key, value)
        inner = config.get_text_config()
        if inner is not config and hasattr(inner, key):
            setattr(inner, key, value)


def _in_peft(model: nn.Module, folder: Path, base_kind: str) -> nn.Module:
    require("peft")
    import peft

    with quiet_libraries():
        # The weights are not loaded yet, so that PEFT must not subtract initial factors here: see _residuals.
        config = peft_config(
            folder, plain=_changes_base(read_json(folder / "adapter_config.json").get("init_lora_weights"))
        )
        config.inference_mode = True
        try:
            loaded: nn.Module = peft.PeftModel.from_pretrained(
                model, str(folder), config=config, low_cpu_mem_usage=True
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedError(f"{folder}: PEFT cannot load this adapter", got=f"{error!r:.300}") from error
    return _without_untrained(loaded, folder).eval()


def _without_untrained(live: nn.Module, folder: Path) -> nn.Module:
    """Return the model without the adapter in layers that the config names but that have no tensors in the file.

    PEFT initialises their B to zero, so that they change nothing; loaded without memory, they would keep an undefined
    B. Raises UnsupportedError where no layer has tensors: PEFT ignores an adapter whose module paths the model does not
    have.
    """
    from peft.tuners.lora import LoraLayer

    weights = find_weights(folder)
    names = [] if weights is None else [ref.name for ref in read_weights(weights).tensors]
    layers = {path: layer for path, layer in live.named_modules() if isinstance(layer, LoraLayer)}
    untrained = [path for path in layers if not any(name.startswith(f"{path}.") for name in names)]
    factors = [name for name in names if ".lora_" in name]
    if layers and factors and len(untrained) == len(layers):
        raise UnsupportedError(
            f"{folder}: its tensors belong to no layer of {type(live.get_base_model()).__name__}",  # type: ignore[operator]
            expected=f"names like {untrained[0]}",
            got=factors[0],
            hint="give a base whose config.json names the class that the adapter was trained in",
        )
    for path in untrained:
        layers[path].delete_adapter("default")
    missing = [name for name, parameter in live.named_parameters() if parameter.is_meta]
    if missing:
        raise UnsupportedError(
            f"{folder}: PEFT makes tensors for its config that the file does not hold",
            got=f"{len(missing)}, first {missing[0]}",
            hint="use the adapter_config.json of the training",
        )
    return live


def _changes_base(init: object) -> bool:
    """Return True for initialisations that change the base's weight."""
    return (isinstance(init, str) and init.startswith(("pissa", "corda"))) or init in ("olora", "loftq", "lora_ga")


def _residuals(live: nn.Module, bound: BoundAdapter, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return, by module path, functions that subtract the initial factors from the loaded weight."""
    by_path: dict[str, Callable[[], None]] = {}
    for item in bound.modules:
        module = item.module
        if isinstance(module, LoraModule) and module.initial is not None and bound.base_kind != "residual":
            layer = live_layer(live, module.name)
            by_path[module.name] = _residual_of(layer, item, module, module.initial, dtype)
    return by_path


def _residual_of(
    layer: Any, item: BoundModule, module: LoraModule, initial: Initial, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a function that replaces the layer's loaded weight by its residual W0 - s B0 A0."""
    kept = TORCH_DTYPES[initial.dtype or item.weight.dtype]

    def subtract() -> None:
        weight = layer.get_base_layer().weight
        if initial.refs or initial.method not in ("svd", "qr"):
            stored = (weight.data.T if item.transposed else weight.data).to(TORCH_DTYPES[item.weight.dtype])
            residual = subtracted_from(module, lambda: stored, stored.dtype).rows(stored)[0].to(dtype)
            weight.data = residual.T if item.transposed else residual
            return
        trained = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        weight.data = weight.data.to(kept)
        if initial.method == "qr":
            layer.olora_init("default")
        else:
            layer.pissa_init("default", "pissa")
        weight = layer.get_base_layer().weight
        weight.data = weight.data.to(dtype).contiguous()
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = trained

    return subtract


def _replace_forwards(model: nn.Module, bound: BoundAdapter, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Replace the forward of each adapted module; return, by path, functions to call once its weight is loaded."""
    by_path: dict[str, Callable[[], None]] = {}
    for item in {item.module.name: item for item in bound.modules}.values():
        path = module_path(model, item.module.name)
        by_path[path] = _replace_forward(model.get_submodule(path), item, dtype)
    if any(isinstance(item.module, DcftModule) for item in bound.modules):
        use_authors_attention(model)
    return by_path


def _replace_forward(layer: Any, item: BoundModule, dtype: torch.dtype) -> Callable[[], None]:
    plain: Callable[[Tensor], Tensor] = layer.forward
    forwards: list[Forward] = []
    layer.forward = lambda x: forwards[0](layer, plain, x)

    def prepare() -> None:
        weight = layer.weight
        weight.data = weight.data.to(TORCH_DTYPES[item.weight.dtype])  # a residual is rounded to the base's dtype
        forwards[:] = [forward_of(item.module, layer, dtype)]
        weight.data = weight.data.to(dtype)

    return prepare
