"""Figures of dense deltas: the norm of each, and its ratio to the weight's norm where the base is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapter_merge.storage.checkpoint import Checkpoint, read_weights
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .module_grid import cell_of


def measure_deltas(folder: Path, base: Checkpoint | None) -> dict[str, dict[str, Any]]:
    """Return shape, |dW| and, where `base` has the weight, |dW| / |W| of each tensor of delta.safetensors, by module.

    Norms are Frobenius norms in float64, one tensor in memory at a time.
    """
    figures: dict[str, dict[str, Any]] = {}
    for ref in read_weights(folder / "delta.safetensors").tensors:
        norm = _norm(ref)
        weight = base.tensors.get(ref.name) if base is not None else None
        weight_norm = _norm(weight) if weight is not None else 0.0
        figures[cell_of(ref.name).name] = {
            "shape": list(ref.shape),
            "delta_norm": norm,
            "relative_delta": norm / weight_norm if weight_norm else None,
        }
    return figures


def _norm(ref: TensorRef) -> float:
    """Return the tensor's Frobenius norm, computed in float64."""
    return float(torch.linalg.vector_norm(read_tensor(ref), dtype=torch.float64))
