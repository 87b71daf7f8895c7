"""Tensors that were trained whole (modules_to_save, biases, heads), and the stored tensors that each one replaces.

A replacement must end in a tensor that some loader reads: one that the base stores, or a new one that the model has and
the base lacks, such as a classifier or the output head that was tied to the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import replace

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import Adapter
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

from .embeddings import TIED_HEADS, is_resized
from .weight_names import Renaming


def place_replacement(
    name: str, ref: TensorRef, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> dict[str, TensorRef] | Problem:
    """Name in the output -> tensor of the adapter (its rows, where the base keeps them in several tensors)."""
    parts = _in_parts(name, ref, rename)
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


def _in_parts(name: str, ref: TensorRef, rename: Renaming) -> dict[str, TensorRef] | Problem | None:
    """The same for a parameter that the base keeps in several tensors (experts apart); None where it does not."""
    mapped = rename.mapped
    parameter = mapped.parameter(name) if mapped is not None else None
    if mapped is None or parameter is None or mapped.whole(parameter) is not None:
        return None
    rows, shape = mapped.rows_of(parameter), mapped.shapes[parameter]
    if not rows:
        return None
    complete = all(item.rows == (0, item.ref.rows) and not item.turned for item in rows)
    if ref.shape != shape or not complete or any(item.ref.shape[-1] != shape[-1] for item in rows):
        return Problem(
            f"{name}: was trained whole, but the base keeps it as parts of other tensors",
            hint="save the base in the layout of the model: save_pretrained(..., save_original_format=False)",
        )
    return {item.ref.name: _rows(ref, item.own, item.ref.shape) for item in rows}


def _is_new(name: str, target: str, adapter: Adapter, base: Checkpoint, rename: Renaming) -> bool:
    """True for a tensor that the base lacks and the model has: of a saved module, or a head that was tied."""
    if target in TIED_HEADS:
        return rename.mapped is not None or not any(key.endswith("." + target) for key in base.tensors)
    saved = adapter.config.get("modules_to_save")
    modules = [one for one in saved if isinstance(one, str)] if isinstance(saved, list) else []
    mine = [one for one in modules if f".{one}." in f".{name}"]
    if not mine:
        return False
    if rename.mapped is not None and rename.mapped.parameter(name) is not None:
        return True
    # Without transformers' word: only a module of which the base has nothing, under any prefix.
    return not any(f".{one}." in f".{key}" for one in mine for key in base.tensors)


def _rows(ref: TensorRef, rows: tuple[int, int], shape: tuple[int, ...]) -> TensorRef:
    """Rows of `ref`'s 2-D view, as a tensor of `shape`."""
    size = ref.nbytes // math.prod(ref.shape[:-1])
    return replace(ref, shape=shape, start=ref.start + rows[0] * size, stop=ref.start + rows[1] * size)
