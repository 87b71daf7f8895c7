"""Tensors that were trained in full (modules_to_save, biases, heads), and the stored tensors that they replace.

A replacement must become a tensor that a loader reads: one that the base stores, or a new one of the model, such as a
classifier or an output head that was tied to the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import replace

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

from .embeddings import TIED_HEADS, is_resized
from .weight_names import Renaming


def place_replacement(
    name: str, ref: TensorRef, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> dict[str, TensorRef] | Problem:
    """Return output name -> tensor of the adapter (or rows, where the base stores several tensors), or the problem."""
    parts = _split_rows(name, ref, rename)
    if parts is not None:
        return parts
    target = rename(name)
    old = base.tensors.get(target)
    if adapter.own_base is not None:
        return {target: ref}
    if old is None and not _is_new(name, target, adapter, base, rename):
        return Problem(
            f"{target}: the base has no such tensor",
            "a tensor of the base, or of a new head in modules_to_save",
            hint="an unknown tensor of the adapter is never written into a model",
        )
    if old is not None and old.shape != ref.shape and not is_resized(target, old, ref):
        return Problem(f"{target}: the adapter's tensor does not fit the base", str(old.shape), str(ref.shape))
    return {target: ref}


def missing_replacements(adapter: Adapter, base: Checkpoint) -> list[Problem]:
    """Return a problem for each module of the base that modules_to_save names and the adapter holds no tensor of."""
    saved = adapter.config.get("modules_to_save")
    if adapter.format != AdapterFormat.PEFT or not isinstance(saved, list):
        return []
    trained_names = {*adapter.replacements, *(f"{module.name}." for module in adapter.modules)}
    missing = [
        module
        for module in saved
        if isinstance(module, str)
        and any(f".{module}." in f".{name}" for name in base.tensors)
        and not any(f".{module}." in f".{name}" for name in trained_names)
    ]
    return [
        Problem(
            f"{adapter.folder}: modules_to_save names {module}, and the file holds no tensor of it",
            expected=f"the trained {module}",
            hint="PEFT cannot load this folder: save the adapter again, or remove the name if it was not trained",
        )
        for module in missing
    ]


def _split_rows(name: str, ref: TensorRef, rename: Renaming) -> dict[str, TensorRef] | Problem | None:
    """Return output names and rows of a parameter that the base stores as several tensors; None for any other."""
    mapped = rename.mapped
    parameter = mapped.parameter(name) if mapped is not None else None
    if mapped is None or parameter is None or mapped.find_whole_tensor(parameter) is not None:
        return None
    rows, shape = mapped.rows_of(parameter), mapped.shapes[parameter]
    if not rows:
        return None
    complete = all(item.rows == (0, item.ref.rows) and not item.turned for item in rows)
    if ref.shape != shape or not complete or any(item.ref.shape[-1] != shape[-1] for item in rows):
        return Problem(
            f"{name}: was trained in full, but the base stores it as parts of other tensors",
            hint="save the base in the model's layout: save_pretrained(..., save_original_format=False)",
        )
    return {item.ref.name: _slice_rows(ref, item.parameter_rows, item.ref.shape) for item in rows}


def _is_new(name: str, target: str, adapter: Adapter, base: Checkpoint, rename: Renaming) -> bool:
    """Return True for a tensor that the model has and the base lacks: of a saved module, or a head that was tied."""
    if target in TIED_HEADS:
        return rename.mapped is not None or not any(key.endswith("." + target) for key in base.tensors)
    saved = adapter.config.get("modules_to_save")
    modules = [module for module in saved if isinstance(module, str)] if isinstance(saved, list) else []
    matching = [module for module in modules if f".{module}." in f".{name}"]
    if not matching:
        return False
    if rename.mapped is not None and rename.mapped.parameter(name) is not None:
        return True
    # Without transformers' mapping: only a module of which the base holds no tensor, under any prefix.
    return not any(f".{module}." in f".{key}" for module in matching for key in base.tensors)


def _slice_rows(ref: TensorRef, rows: tuple[int, int], shape: tuple[int, ...]) -> TensorRef:
    """Return rows of the 2-D view of `ref` as a tensor of `shape`."""
    size = ref.nbytes // math.prod(ref.shape[:-1])
    return replace(ref, shape=shape, start=ref.start + rows[0] * size, stop=ref.start + rows[1] * size)
