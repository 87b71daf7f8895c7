"""LoRA on a CPU with one product per adapter of the batch, in place of a copy of A and B per token.

vLLM's torch kernels (lora/ops/torch_ops/lora_ops.py) index the stacked A and B with every token's slot, which copies
both factors once per token and layer, for requests to the base too. Here the tokens of a batch are grouped by slot
once, when vLLM announces the batch, and every layer computes per group

    y[tokens] += (x[tokens] A^T) B^T            A: (r, in), B: (out, r) of the group's slot

Tokens of the base model are in no group: their rows keep every bit, and a batch without adapters costs nothing.
The update is added by one addmm, so that a bfloat16 output is rounded once, where vLLM rounds twice.
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
    """Give vLLM's CPU wrapper of LoRA kernels the grouped products; False where it is not the one that is known."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        known = list(inspect.signature(PunicaWrapperCPU.add_lora_linear).parameters) == LINEAR
        known &= "token_lora_indices" in inspect.unwrap(PunicaWrapperCPU.update_metadata).__code__.co_names
    except (ImportError, AttributeError, ValueError):
        return False
    if known:
        PunicaWrapperCPU.update_metadata = wrap_update_metadata(PunicaWrapperCPU.update_metadata)
        PunicaWrapperCPU.add_lora_linear = wrap_add_lora_linear(PunicaWrapperCPU.add_lora_linear)
    return known


def group_tokens(
    slots: Sequence[int],  # one per token, -1 for the base model
) -> list[Group]:
    """The tokens of each slot, in the order in which slots first appear."""
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
    """Add every group's x A^T B^T to its rows of y."""
    for slot, tokens in groups:
        low = x[tokens] @ a[slot, 0].T  # (n, r)
        if isinstance(tokens, slice):
            y[tokens].addmm_(low, b[slot, 0].T)
        else:
            y[tokens] = torch.addmm(y[tokens], low, b[slot, 0].T)


def wrap_update_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is PunicaWrapperBase.update_metadata, called once before every batch."""

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        slots = self.token_lora_indices.tolist()
        setattr(self, _GROUPS, (len(slots), group_tokens(slots)))
        return result

    return update_metadata


def wrap_add_lora_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is PunicaWrapperCPU.add_lora_linear; it keeps what is no batch of tokens in one dtype."""

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
            not torch.compiler.is_compiling()  # the groups of one batch are no part of a graph
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
