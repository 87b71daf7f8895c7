"""The live, unmerged model of one adapter or of several: what every artefact is compared with."""

from __future__ import annotations

import torch
from torch import nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.combined_adapter import CombinedBound

from .live_adapter import adapted_model
from .live_combination import combined_model


def trained_model(bound: BoundAdapter, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base with the adapter live in it, unmerged, computing in `dtype`; of several adapters their combination."""
    return combined_model(bound, dtype) if isinstance(bound, CombinedBound) else adapted_model(bound, dtype)
