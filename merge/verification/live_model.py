"""The live, unmerged model of one adapter or of a combination, the reference of every comparison."""

from __future__ import annotations

import torch
from torch import nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.combined_adapter import CombinedBound

from .streamed_adapter import held_model, streamed_combination, streamed_trained


def trained_model(bound: BoundAdapter, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the base with the live adapter, or with a combination, computing in `dtype`; all weights are in memory."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(bound, CombinedBound):
        return held_model(streamed_combination(bound, wide)).to(dtype)
    return held_model(streamed_trained(bound, wide)).to(dtype)
