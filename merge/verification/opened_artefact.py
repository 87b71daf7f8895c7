"""Opening of the adapter or factors that are compared with the adapter as trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.methods.lora import LoraModule


def open_artefact(bound: BoundAdapter, folder: Path, base_kind: str) -> BoundAdapter:
    """Open the adapter or factors in `folder` and bind them to the base of `bound`, the adapter as trained.

    Evidence against the base is ignored, since the values themselves are compared. Where the folder does not state the
    dtype of a residual, that of the adapter as trained is used.
    """
    opened = open_pair(bound.base.folder, folder, base_kind, ReadOptions(force=True))
    dtypes = {
        item.name: item.module.initial.dtype
        for item in bound.modules
        if isinstance(item.module, LoraModule) and item.module.initial is not None
    }

    def with_dtype(item: BoundModule) -> BoundModule:
        module = item.module
        if not isinstance(module, LoraModule) or module.initial is None or module.initial.dtype is not None:
            return item
        return replace(item, module=replace(module, initial=replace(module.initial, dtype=dtypes.get(item.name))))

    return replace(opened, modules=tuple(with_dtype(item) for item in opened.modules))
