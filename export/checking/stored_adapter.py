"""Reading of one adapter's tensors from an export.

A switchable export stores them in the adapter's file, a batched one in the adapter's slot of the graph's stacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.adapter_file import SUFFIX, load_tensors
from adapter_merge.export.graph.targets import Layout

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class ExportedFactors:
    """The factors of an adapter for one target, in float64: W' = (W0 + (A B)^T) * s, where s multiplies rows."""

    down: Tensor  # A (k, R)
    up: Tensor  # B (R, n)
    scale: Tensor | None  # s (n,); None: 1

    def apply(self, weight: Tensor, start: int) -> Tensor:
        """Return W' (size, k); weight: W0 (size, k), the rows of the target from row `start` on."""
        rows = slice(start, start + weight.shape[0])
        changed = weight + (self.down @ self.up[:, rows]).T
        return changed if self.scale is None else changed * self.scale[rows, None]


def read_exported_adapter(
    folder: Path, manifest: Manifest, layout: Layout, chosen: str | None, graph: Mapping[str, ir.Value]
) -> tuple[dict[str, ExportedFactors] | None, dict[str, Tensor]]:
    """Return the chosen adapter's factors by target, and the weights that it replaces by name.

    chosen: the adapter's name in the export; None for the base alone. graph: the initialisers by name. The factors are
    None in a merged export, whose weights are the merged ones.
    """
    if manifest.mode == "merged":
        return None, {}
    if chosen is None:
        return {}, {}
    if manifest.mode == "switchable":
        tensors = {
            name: torch.from_numpy(value.numpy().copy())
            for name, value in load_tensors(folder / f"{chosen}{SUFFIX}", layout).items()
        }
        heads = {tensor: tensors[name] for tensor, name in layout.heads.items() if name in tensors}
    else:
        slot = int(manifest.adapters[chosen]["id"])
        names = {name for target in layout.targets for name in (target.down_name, target.up_name, target.scale_name)}
        tensors = {name: read_initialiser(graph[name])[slot] for name in names if name in graph}
        heads = {}
    factors = {}
    for target in layout.targets:
        scale = tensors.get(target.scale_name)
        if target.down_name in tensors or scale is not None:
            factors[target.name] = ExportedFactors(
                tensors.get(target.down_name, torch.zeros(target.k, 0)).double(),
                tensors.get(target.up_name, torch.zeros(0, target.n)).double(),
                None if scale is None else scale.reshape(-1).double(),
            )
    return factors, heads


def read_initialiser(value: ir.Value) -> Tensor:
    """Return a stored initialiser as a tensor of the same shape and dtype."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
