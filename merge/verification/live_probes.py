"""Comparison of the weights' formulas with live layers: PEFT's, or the methods' own forwards.

The comparison of weights is based on weight_formulas.py. This file checks these formulas: for random inputs X (PROBES,
in), the output of each adapted layer of the live model, without the bias, must be X W'^T. This detects errors in the
formulas and in the reading of an adapter folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.methods.lora import BiasModule, ExpertModule, RowSliceModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.tensor_io import read_tensor

from .compare_weights import WEIGHT_TOLERANCE
from .live_adapter import innermost, live_layer
from .streamed_model import StreamedModel
from .whole_formulas import modules_by_tensor, whole_weight

PROBES = 8
SIGNAL = 6  # positions per dimension of a convolution's input, beyond its kernel


@torch.no_grad()
def find_formula_errors(bound: BoundAdapter, streamed: StreamedModel) -> list[str]:
    """Return the names of the tensors whose live layer does not compute with the W' of the formula.

    streamed: the model with the live adapter, in float64.
    """
    source = torch.Generator().manual_seed(0)
    disagreeing = []
    for name, items in modules_by_tensor(bound).items():
        weights = _Weights(*whole_weight(items))
        for path in dict.fromkeys(item.module.name for item in items):
            layer_items = [item for item in items if item.module.name == path]
            layer = live_layer(streamed.model, path)
            streamed.hold_module(path)
            if not _agrees(layer, layer_items, weights, source):
                disagreeing.append(name)
                break
    return disagreeing


@dataclass(frozen=True, eq=False)
class _Weights:
    """A weight, or a part of one; float64."""

    base: Tensor  # W0
    after: Tensor  # W'
    slack: Tensor | None  # the uncertainty of W'; the live layer may round its residual to the other neighbour

    def map(self, change: Callable[[Tensor], Tensor]) -> _Weights:
        """Return the weights with `change` applied to all three tensors."""
        return _Weights(change(self.base), change(self.after), None if self.slack is None else change(self.slack))

    def agrees_with(self, output: Tensor, x: Tensor) -> bool:
        """Return True when `output` is x W'^T."""
        tolerance = 0.0 if self.slack is None else torch.linalg.vector_norm(x.abs() @ self.slack.T)
        return _is_close(output, x @ self.after.T, x @ self.base.T, tolerance)


def _agrees(layer: Any, items: Sequence[BoundModule], weights: _Weights, source: torch.Generator) -> bool:
    """Return True where the live layer computes with W'; items: the modules of one adapter on this layer."""
    item = items[0]
    if isinstance(item.module, ExpertModule) or hasattr(layer, "parameter_name"):
        return all(_is_same_expert(layer, expert, weights.base, weights.after) for expert in items)
    if isinstance(item.module, BiasModule) or item.module.parameter == "bias":
        weight = _inner_weight(layer)
        answer = layer(torch.zeros(1, weight[1] if not weight[2] else weight[0], dtype=torch.float64))
        return _is_close(answer[0], weights.after, weights.base)
    if item.rows is not None:
        rows = slice(*item.rows)
        weights = weights.map(lambda whole: whole.reshape(-1, whole.shape[-1])[rows])
    if item.transposed:
        weights = weights.map(lambda whole: whole.T)
    if isinstance(innermost(layer), nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _is_same_convolution(layer, weights, source)
    if weights.after.dim() != 2:
        return True
    if isinstance(innermost(layer), nn.Embedding):
        ids = torch.randint(weights.after.shape[0], (PROBES,), generator=source)
        trained = [torch.tensor(token.module.indices) for token in items if isinstance(token.module, TokenModule)]
        ids = torch.cat([ids, *trained])
        return _is_close(layer(ids), weights.after[ids], weights.base[ids])
    x = torch.randn(PROBES, weights.after.shape[1], generator=source, dtype=torch.float64)
    output = layer(x) - layer(torch.zeros_like(x))
    if isinstance(item.module, RowSliceModule):
        output = output[:, item.module.start : item.module.stop]
    return weights.agrees_with(output, x)


def _is_same_convolution(layer: Any, weights: _Weights, source: torch.Generator) -> bool:
    """Return True where a live convolution equals the model's own layer with weight W', on random signals."""
    inner: Any = innermost(layer)
    sizes = [SIGNAL + step * (width - 1) for step, width in zip(inner.dilation, inner.kernel_size, strict=True)]
    x = torch.randn(2, inner.in_channels, *sizes, generator=source, dtype=torch.float64)
    with_adapter, without = (
        torch.func.functional_call(inner, {"weight": matrix.reshape(inner.weight.shape)}, (x,))
        for matrix in (weights.after, weights.base)
    )
    return _is_close(layer(x), with_adapter, without)


def _inner_weight(layer: Any) -> tuple[int, int, bool]:
    """Rows and columns of a linear layer's weight, and whether it is stored as (in, out)."""
    inner: Any = innermost(layer)
    return *inner.weight.shape, type(inner).__name__ == "Conv1D"


def _is_same_expert(layer: Any, item: BoundModule, base: Tensor, after: Tensor) -> bool:
    """Return True where PEFT's delta of one expert, or of a parameter without a layer, leads to W'."""
    wrapper = layer
    factors = read_tensor(item.module.refs[0])
    while not (
        wrapper.lora_A["default"].weight.shape == factors.shape
        and torch.equal(wrapper.lora_A["default"].weight, factors.to(torch.float64))
    ):
        wrapper = wrapper.base_layer
    live = wrapper.get_param() + wrapper.get_delta_weight("default")
    module = item.module
    if isinstance(module, ExpertModule):
        live = live.reshape(-1, *live.shape[-2:])[module.index]
        if item.rows is not None:
            after, base = (matrix.reshape(-1, matrix.shape[-1])[slice(*item.rows)] for matrix in (after, base))
        else:
            live = live[slice(*module.rows)]
    return live.shape == after.shape and _is_close(live, after, base)


def _is_close(actual: Tensor, expected: Tensor, plain: Tensor, tolerance: Tensor | float = 0.0) -> bool:
    """Return True when `actual` equals `expected`, relative to the distance of `expected` from `plain` (no adapter).

    tolerance: a further allowed difference, as a norm.
    """
    effect = torch.linalg.vector_norm(expected - plain).clamp_min(1e-300)
    noise = 1e-12 * torch.linalg.vector_norm(expected)
    return bool(torch.linalg.vector_norm(actual - expected) <= WEIGHT_TOLERANCE * effect + noise + tolerance)
