"""LoRA on a CPU with one product per adapter of the batch, instead of a copy of A and B per token.

vLLM's torch kernels (lora/ops/torch_ops/lora_ops.py) index the stacked A and B with every token's slot, which copies
both factors once per token and layer, also for requests to the base. Here the tokens are grouped by slot once per
batch, in update_metadata, and every layer computes for each group

    y[tokens] += (x[tokens] A^T) B^T            A: (r, in), B: (out, r) of the group's slot

Tokens of the base model are in no group: their rows do not change, and a batch without adapters has no extra cost. The
update is added by one addmm, so that a bfloat16 output is rounded once, where vLLM rounds twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The slot of A and B, and its tokens: a slice where they are consecutive, else their (n,) int64 indices.
Group = tuple[int, slice | Tensor]

LINEAR = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"]
_GROUPS = "_adapter_merge_groups"


def install() -> bool:
    """Patch vLLM's CPU wrapper of LoRA kernels; return False, without a change, for an unknown version of it."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        is_known = list(inspect.signature(PunicaWrapperCPU.add_lora_linear).parameters) == LINEAR
        is_known &= "token_lora_indices" in inspect.unwrap(PunicaWrapperCPU.update_metadata).__code__.co_names
    except (ImportError, AttributeError, ValueError):
        return False
    if is_known:
        PunicaWrapperCPU.update_metadata = wrap_update_metadata(PunicaWrapperCPU.update_metadata)
        PunicaWrapperCPU.add_lora_linear = wrap_add_lora_linear(PunicaWrapperCPU.add_lora_linear)
    return is_known


def group_tokens(
    slots: Sequence[int],  # one per token, -1 for the base model
) -> list[Group]:
    """Return the tokens of each slot, in the order in which slots first appear."""
    tokens: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        if slot >= 0:
            tokens.setdefault(slot, []).append(token)
    groups: list[Group] = []
    for slot, members in tokens.items():
        first, last = members[0], members[-1]
        consecutive = last - first + 1 == len(members)
        groups.append((slot, slice(first, last + 1) if consecutive else torch.tensor(members)))
    return groups


def add_products(
    y: Tensor,  # (tokens, out), a view, overwritten
    x: Tensor,  # (tokens, in)
    a: Tensor,  # (slots, 1, r, in)
    b: Tensor,  # (slots, 1, out, r)
    groups: Sequence[Group],
) -> None:
    """Add x A^T B^T of every group to its rows of y."""
    for slot, tokens in groups:
        low = x[tokens] @ a[slot, 0].T  # (n, r)
        if isinstance(tokens, slice):
            y[tokens].addmm_(low, b[slot, 0].T)
        else:
            y[tokens] = torch.addmm(y[tokens], low, b[slot, 0].T)


def wrap_update_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap PunicaWrapperBase.update_metadata (`original`), called once before every batch: group the tokens."""

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        slots = self.token_lora_indices.tolist()
        setattr(self, _GROUPS, (len(slots), group_tokens(slots)))
        return result

    return update_metadata


def wrap_add_lora_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap PunicaWrapperCPU.add_lora_linear (`original`), which still handles inputs without groups."""

    def add_lora_linear(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        count, groups = getattr(self, _GROUPS, (-1, []))
        ours = (
            not torch.compiler.is_compiling()  # a compiled graph must not contain the groups of one batch
            and buffer is None
            and not kwargs
            and scale == 1
            and x.dim() == 2
            and x.shape[0] == count
            and x.dtype == y.dtype
            and all(factor.dtype == x.dtype for factor in (*lora_a_stacked, *lora_b_stacked))
        )
        if not ours:
            return original(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
        rows = y.view(-1, y.shape[-1])
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            add_products(rows[:, start : start + width], x, a, b, groups)
            start += width
        return None

    return add_lora_linear
