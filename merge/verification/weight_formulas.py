"""W' of one stored tensor in float64, by blocks of rows, from each method's own formula.

The comparison of weights is based on this file. It shares the readers of headers, names and settings with the merge,
but no arithmetic: it uses neither the canonical form nor edits nor the engine. live_probes.py compares its results with
live layers.

    after = scale_rows * (frozen + delta) * scale_columns
    frozen   W0, or the frozen residual W_f = round(W0 - s B0 A0) of PiSSA, OLoRA and DuDe
    delta    s B A; kron(W1, W2); (W1a W1b) * (W2a W2b); a transposed convolution; ...

For a tensor that is stored as (in, out) all matrices are transposed, so that a block is always rows of the tensor's 2-D
view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from adapter_merge.binding.bound import BoundModule
from adapter_merge.errors import UnsupportedError
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.methods.dcft_reshape import DcftReshapeModule
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import BiasModule, ExpertModule, LoraModule, RowSliceModule
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.methods.vera import VeraModule
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

from .forward_formulas import Subtracted, dcft_scale, subtracted_from

BLOCK = 1 << 16  # elements of a block: 512 KiB in float64, so that its temporaries stay in the cache
_LEAST = torch.finfo(torch.float64).tiny

Delta = Callable[[int, int], Tensor]  # (first, stop) -> rows of the delta, float64


class Formula(Protocol):
    """The change of one stored tensor, computed for any block of its rows."""

    def after(self, base: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Return (W', slack) of rows first .. first + n; `base`: the same rows of W0 in float64.

        slack: the uncertainty of each element, where the residual may be rounded up or down; None: no uncertainty.
        """


def read_rows(sources: Sources, ref: TensorRef, first: int, stop: int) -> Tensor:
    """Return rows first .. stop of the tensor's 2-D view, in its own dtype."""
    raw = torch.empty((stop - first) * ref.row_bytes, dtype=torch.uint8)
    if raw.numel():
        sources.read(ref, first * ref.row_bytes, raw)
    return raw.view(TORCH_DTYPES[ref.dtype]).reshape(stop - first, -1)


def row_blocks(ref: TensorRef) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of the blocks in which a tensor is read."""
    columns = max(1, ref.shape[-1] if ref.shape else 1)
    step = max(1, BLOCK // columns)
    for first in range(0, ref.rows, step):
        yield first, min(ref.rows, first + step)


@dataclass(frozen=True, eq=False)
class Adapted:
    """after = scale_rows * (frozen + delta) * scale_columns."""

    delta: Delta
    columns: int
    magnitude: Tensor | None = None  # (rows,), or (columns,) where by_column
    own_magnitude: bool = False  # the magnitude is the norm of the frozen weight
    by_column: bool = False
    saved: TensorRef | None = None  # W_f, saved beside the adapter
    subtracted: Subtracted | None = None
    column_scale: Tensor | None = None  # (columns,)
    column_slack: Tensor | None = None  # (columns,): its relative uncertainty by the residual's rounding

    def frozen(self, base: Tensor, first: int, sources: Sources) -> tuple[Tensor, Tensor | None]:
        """Return the rows of the frozen weight that belong to `base`, and their slack."""
        stop = first + base.shape[0]
        if self.saved is not None:
            return read_rows(sources, self.saved, first, stop).to(torch.float64), None
        if self.subtracted is None:
            return base, None
        frozen, slack = self.subtracted.rows(base, first)
        return frozen.to(torch.float64), slack if slack.dim() else None

    def direction(self, base: Tensor, first: int, sources: Sources) -> tuple[Tensor, Tensor | None]:
        """Return the rows of frozen + delta that belong to `base`, and their slack."""
        frozen, slack = self.frozen(base, first, sources)
        return frozen + self.delta(first, first + base.shape[0]), slack


@dataclass(frozen=True, eq=False)
class Rows:
    """Single rows replaced: trained tokens."""

    indices: Tensor  # (n,)
    values: Tensor  # (n, columns)


@dataclass(frozen=True, eq=False)
class Replacement:
    """Every row replaced: a head or bias that was trained in full."""

    value: TensorRef


@dataclass(frozen=True, eq=False)
class Step:
    """One change of the rows first .. stop of the tensor's 2-D view; the change counts its rows from 0."""

    change: Adapted | Rows | Replacement
    first: int = 0
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class TensorFormula:
    """All changes of one stored tensor, in order."""

    steps: tuple[Step, ...]
    sources: Sources

    def after(self, base: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        slack: Tensor | None = None
        result = base
        for step in self.steps:
            begin = max(first, step.first)
            end = first + base.shape[0] if step.stop is None else min(first + base.shape[0], step.stop)
            if begin >= end:
                continue
            part = result[begin - first : end - first]
            new, step_slack = _apply(step.change, part, begin - step.first, self.sources)
            if begin == first and end == first + base.shape[0]:
                result = new
            else:
                result = result.clone() if result is base else result
                result[begin - first : end - first] = new
            if step_slack is not None:
                slack = torch.zeros_like(base) if slack is None else slack
                slack[begin - first : end - first] += step_slack
        return result, slack


def _apply(
    change: Adapted | Rows | Replacement, part: Tensor, start: int, sources: Sources
) -> tuple[Tensor, Tensor | None]:
    """Return W' and its slack for the rows `part` of W0, which begin at row `start` of the change."""
    if isinstance(change, Replacement):
        return read_rows(sources, change.value, start, start + part.shape[0]).to(part).reshape(part.shape), None
    if isinstance(change, Rows):
        inside = (change.indices >= start) & (change.indices < start + part.shape[0])
        result = part.clone()
        result[change.indices[inside] - start] = change.values[inside]
        return result, None
    direction, slack = change.direction(part, start, sources)
    scale, spread = change.column_scale, change.column_slack
    if scale is None and (change.magnitude is not None or change.own_magnitude):
        spread = None if slack is None else _norm_spread(direction, slack)
        if change.magnitude is None:
            frozen = change.frozen(part, start, sources)[0]
            magnitude = torch.linalg.vector_norm(frozen, dim=1)
            spread = None if slack is None or spread is None else spread + _norm_spread(frozen, slack)
        else:
            magnitude = change.magnitude[start : start + part.shape[0]]
        scale = _quotient(magnitude, torch.linalg.vector_norm(direction, dim=1))[:, None]
    if scale is None:
        return direction, slack
    result = direction * scale
    if slack is None or spread is None:
        return result, None
    return result, slack * scale.abs() + result.abs() * spread


def _norm_spread(weight: Tensor, slack: Tensor) -> Tensor:
    """Return (rows, 1): the relative uncertainty of the rows' norms by `slack`: sum (|w_i| + s_i) s_i / ||w||^2.

    An element of the residual that is rounded the other way changes the norm, and with it the whole row.
    """
    most = ((weight.abs() + slack) * slack).sum(1, keepdim=True)
    return most / weight.square().sum(1, keepdim=True).clamp_min(_LEAST)


def _quotient(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return m / norm; 1 for a row of zeros with magnitude 0, which stays zero."""
    return torch.where((norm == 0) & (magnitude == 0), torch.ones_like(norm), magnitude / norm)


def tensor_formula(items: Sequence[BoundModule], sources: Sources) -> TensorFormula:
    """Return the formula of all modules `items` of one adapter on one stored tensor. Raises UnsupportedError."""
    return formula_in_turn([(None, items)], sources)


def formula_in_turn(
    adapters: Sequence[tuple[TensorRef | None, Sequence[BoundModule]]], sources: Sources
) -> TensorFormula:
    """Return the formula of several adapters on one stored tensor, each applied to the result of those before it.

    adapters: for each adapter, the tensor that replaces the stored one, or None, and its modules on it.
    """
    steps: list[Step] = []
    for replacement, items in adapters:
        if replacement is not None:
            steps.append(Step(Replacement(replacement)))
        for item in items:
            rows = item.rows or (0, None)
            change = _make_change(item)
            if (
                isinstance(change, Adapted)
                and change.by_column
                and (change.magnitude is not None or change.own_magnitude)
            ):
                before = TensorFormula(tuple(steps), sources)
                change = _with_column_scale(change, before, item, sources)
            steps.append(Step(change, *rows))
    return TensorFormula(tuple(steps), sources)


def _with_column_scale(change: Adapted, before: TensorFormula, item: BoundModule, sources: Sources) -> Adapted:
    """Return `change` with the scale m / norm of its columns, which takes a pass over the whole tensor."""
    frozen_squares, squares, frozen_slack, slack = torch.zeros(4, change.columns, dtype=torch.float64)
    is_uncertain = False
    offset, end = item.rows or (0, item.weight.rows)
    for first, stop in row_blocks(item.weight):
        base = read_rows(sources, item.weight, first, stop).to(torch.float64)
        base = before.after(base, first)[0]
        first, base = max(first, offset), base[max(0, offset - first) : max(0, end - first)]
        if not base.shape[0]:
            continue
        direction, row_slack = change.direction(base, first - offset, sources)
        squares += direction.square().sum(0)
        frozen = change.frozen(base, first - offset, sources)[0] if change.magnitude is None else None
        frozen_squares += 0 if frozen is None else frozen.square().sum(0)
        if row_slack is not None:
            is_uncertain = True
            slack += ((direction.abs() + row_slack) * row_slack).sum(0)
            frozen_slack += 0 if frozen is None else ((frozen.abs() + row_slack) * row_slack).sum(0)
    scale = _quotient(frozen_squares.sqrt() if change.magnitude is None else change.magnitude, squares.sqrt())
    if not is_uncertain:
        return replace(change, column_scale=scale)
    spread = slack / squares.clamp_min(_LEAST) + frozen_slack / frozen_squares.clamp_min(_LEAST)  # see _norm_spread
    return replace(change, column_scale=scale, column_slack=spread)


# -- the methods ---------------------------------------------------------------------------------------------------


def _read(ref: TensorRef) -> Tensor:
    """Read a tensor in float64."""
    return read_tensor(ref).to(torch.float64)


def _product(up: Tensor, down: Tensor) -> Delta:
    """Return the delta up @ down."""
    return lambda first, stop: up[first:stop] @ down


def _make_change(item: BoundModule) -> Adapted | Rows:
    """Return the change of one module. Raises UnsupportedError for a method without a formula."""
    module, transposed = item.module, item.transposed
    if isinstance(module, TokenModule):
        return Rows(torch.tensor(module.indices, dtype=torch.int64), _read(module.values))
    if isinstance(module, PeftLayerModule):
        dense = module.probe_layer(read_tensor, item.oriented_weight)
        dense = dense - item.oriented_weight().to(torch.float64).reshape(dense.shape)
        return Adapted(lambda first, stop: dense[first:stop], dense.shape[1])
    if isinstance(module, BiasModule):
        vector = _read(module.vector)[None] * module.scale
        return Adapted(lambda first, stop: vector, vector.shape[1])
    if isinstance(module, LoraModule):
        return _lora(module, item, None)
    if isinstance(module, RowSliceModule):
        return _lora(module.whole, item, (module.start, module.stop))
    delta, magnitude, by_column = _delta(module, transposed)
    columns = module.shape[0] if transposed else module.shape[1]
    return Adapted(delta, columns, magnitude, by_column=by_column != transposed if magnitude is not None else False)


def _delta(module: AdaptedModule, transposed: bool) -> tuple[Delta, Tensor | None, bool]:
    """Return the delta as it is stored, the magnitude, and True for one magnitude per input column."""
    magnitude: Tensor | None = None
    by_column = False
    if isinstance(module, ExpertModule):
        a = _read(module.a).reshape(module.experts, module.rank, -1)[module.index]
        b = _read(module.b).reshape(-1, module.rank, module.experts)[slice(*module.rows), :, module.index]
        up, down = (a.T * module.scale, b.T) if transposed else (b * module.scale, a)
        return _product(up, down), None, False
    if isinstance(module, VeraModule):
        a, b = (value.to(torch.float64) for value in module.projections.read(read_tensor))
        out, inner = module.shape
        up = _read(module.lambda_b)[:, None] * b[:out]
        down = _read(module.lambda_d)[:, None] * a[:, :inner]
        return _product(*((down.T, up.T) if transposed else (up, down))), None, False
    if isinstance(module, DcftModule):
        return _dcft(module, transposed), None, False
    if isinstance(module, DcftReshapeModule):
        dense = _reshaped(module)
        dense = dense.T if transposed else dense
        return (lambda first, stop: dense[first:stop]), None, False
    if isinstance(module, LokrModule | LohaModule):
        if module.magnitude is not None:
            magnitude, by_column = _read(module.magnitude).reshape(-1), module.magnitude_dim == 1
        return (
            (_kron(module, transposed) if isinstance(module, LokrModule) else _hadamard(module, transposed)),
            (magnitude),
            by_column,
        )
    raise UnsupportedError(f"{module.name}: verify has no formula for {type(module).__name__}")


def _lora(module: LoraModule, item: BoundModule, part: tuple[int, int] | None) -> Adapted:
    a, b = _read(module.a), _read(module.b)  # (r, in), (out, r)
    if module.core is not None:
        core = _read(module.core).flatten(2)
        a = torch.stack([a.T @ core[..., place].T for place in range(core.shape[2])], dim=2).permute(1, 0, 2).flatten(1)
    if module.e is not None:
        a = _read(module.e).reshape(-1, 1) * a
    up, down = b * module.scale, a
    transposed = module.embedding != item.transposed
    if transposed:
        up, down = down.T, up.T
    magnitude = None if module.magnitude is None else _read(module.magnitude).reshape(-1)
    by_column = (module.magnitude_dim == 1) != transposed
    if part is not None:
        up = up[slice(*part)]
        magnitude = None if magnitude is None else magnitude[slice(*part)]
    adapted = Adapted(
        _product(up, down),
        down.shape[1],
        magnitude,
        module.own_magnitude,
        by_column and (magnitude is not None or module.own_magnitude),
    )
    if module.frozen is not None:
        return replace(adapted, saved=module.frozen)
    if module.initial is None:
        return adapted
    subtracted = subtracted_from(module, item.oriented_weight, TORCH_DTYPES[item.weight.dtype])
    return replace(adapted, subtracted=subtracted.transposed() if item.transposed else subtracted)


def _dcft(module: DcftModule, transposed: bool) -> Delta:
    """Return the delta dW (out, in) = Delta^T s, or Delta s where transposed; only the wanted rows are computed."""
    channels, r = module.c.shape[0], module.a.shape[-2]
    a = _read(module.a).reshape(channels, r, -1)  # (c, r, n0)
    b = _read(module.b).reshape(channels, -1, r)  # (c, n1, r)
    kernel, scale = _read(module.c), dcft_scale(module)
    bias = 0.0 if module.bias is None else float(_read(module.bias))
    axis = 0 if transposed else 1  # the axis of Delta that the rows of the stored tensor index
    size, step = kernel.shape[2 + axis], module.stride[axis]
    steps = a.shape[2] if axis == 0 else b.shape[1]

    def rows(first: int, stop: int) -> Tensor:
        begin, end = max(0, (first - size) // step), min(steps, stop // step + 1)
        left, right = (a[:, :, begin:end], b) if axis == 0 else (a, b[:, begin:end])
        image = (left.mT @ right.mT)[None]  # (1, c, ., .)
        spread = torch.nn.functional.conv_transpose2d(image, kernel, stride=module.stride)[0, 0]
        spread = spread if axis == 0 else spread.T
        image_rows = spread[first - begin * step : stop - begin * step]
        return (image_rows + bias) * scale

    return rows


def _reshaped(module: DcftReshapeModule) -> Tensor:  # (out, in), whole
    kernel = _read(module.c)
    image = (_read(module.b) @ _read(module.a)).reshape(1, kernel.shape[0], -1, module.a.shape[-1])
    bias = None if module.bias is None else _read(module.bias)
    return torch.nn.functional.conv_transpose2d(image, kernel, bias, stride=kernel.shape[2:])[0, 0].reshape(
        module.shape
    )


def _kron(module: LokrModule, transposed: bool) -> Delta:
    sides = []
    for side, core in ((module.w1, None), (module.w2, module.core)):
        parts = [_read(ref) for ref in side]
        whole = reduce(torch.matmul, parts) if core is None else _through_core(_read(core), *parts)
        sides.append(whole.T if transposed else whole)
    outer, inner = sides

    def rows(first: int, stop: int) -> Tensor:
        places = torch.arange(first, stop)
        left, right = outer[places // inner.shape[0]], inner[places % inner.shape[0]]
        return (left[:, :, None] * right[:, None, :]).reshape(stop - first, -1) * module.scale

    return rows


def _through_core(core: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """Return (out, in k k): the sum over i, j of wa[i, o] core[i, j, k] wb[j, n], for each kernel position k."""
    flat = core.flatten(2)
    return torch.stack([wa.T @ flat[..., place] @ wb for place in range(flat.shape[2])], dim=2).flatten(1)


def _hadamard(module: LohaModule, transposed: bool) -> Delta:
    up1, down1, up2, down2 = (_read(ref) for ref in (module.w1a, module.w1b, module.w2a, module.w2b))
    if module.cores is not None:
        first, second = (_read(core) for core in module.cores)
        dense = _through_core(first, up1, down1) * _through_core(second, up2, down2) * module.scale
        return lambda first, stop: (dense.T if transposed else dense)[first:stop]
    if transposed:
        up1, down1, up2, down2 = down1.T, up1.T, down2.T, up2.T
    return lambda first, stop: (up1[first:stop] @ down1) * (up2[first:stop] @ down2) * module.scale
