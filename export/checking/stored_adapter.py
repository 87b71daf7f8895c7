"""The tensors of one adapter in an export: from its file in a switchable one, from its slot in a batched one."""

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
class HeldFactors:
    """An adapter's tensors for one target: W' = (W0 + (A B)^T) * s by rows."""

    down: Tensor  # A (k, R)
    up: Tensor  # B (R, n)
    scale: Tensor | None  # s (n,)

    def apply(self, weight: Tensor, start: int) -> Tensor:
        """Return W' (size, k) of the rows that begin at column `start` of the target."""
        rows = slice(start, start + weight.shape[0])
        changed = weight + (self.down @ self.up[:, rows]).T
        return changed if self.scale is None else changed * self.scale[rows, None]


def held_adapter(
    folder: Path, manifest: Manifest, layout: Layout, chosen: str | None, graph: Mapping[str, ir.Value]
) -> tuple[dict[str, HeldFactors] | None, dict[str, Tensor]]:
    """Return the chosen adapter's factors by target (None in a merged export), and the heads that it replaces."""
    if manifest.mode == "merged":
        return None, {}
    if chosen is None:
        return {}, {}
    if manifest.mode == "switchable":
        held = {
            name: torch.from_numpy(value.numpy().copy())
            for name, value in load_tensors(folder / f"{chosen}{SUFFIX}", layout).items()
        }
        heads = {tensor: held[name] for tensor, name in layout.heads.items() if name in held}
    else:
        slot = int(manifest.adapters[chosen]["id"])
        names = {name for one in layout.targets for name in (one.down_name, one.up_name, one.scale_name)}
        held = {name: tensor_of(graph[name])[slot] for name in names if name in graph}
        heads = {}
    factors = {}
    for target in layout.targets:
        scale = held.get(target.scale_name)
        if target.down_name in held or scale is not None:
            factors[target.name] = HeldFactors(
                held.get(target.down_name, torch.zeros(target.k, 0)).double(),
                held.get(target.up_name, torch.zeros(0, target.n)).double(),
                None if scale is None else scale.reshape(-1).double(),
            )
    return factors, heads


def tensor_of(value: ir.Value) -> Tensor:
    """Return an initialiser in its own dtype."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
