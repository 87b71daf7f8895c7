"""vLLM's LoRA linear layers with one exact row scale per adapter slot.

A DoRA or DuDe adapter computes, per linear layer,

    y = d * (x W0^T + x A^T B^T) + bias          d: (out,), the row scale of `row_scale.safetensors`

vLLM's layers compute y = x W0^T + bias + x A^T B^T. The subclasses made here then replace each token's row by
d_slot * y + (1 - d_slot) * bias, which equals the formula above with an unscaled bias. A token's slot is the one that
vLLM uses for A and B. Requests for the base model have slot -1, whose scales are all 1, so that their results do not
change.

CUDA graphs and torch.compile require that buffers stay in place: all buffers are allocated once, at the start, a change
of adapter copies into them, and nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Every linear class of vLLM 0.28 to 0.32. Embeddings, lm_head and mixtures of experts are not included: an adapter
# with row scales for one of them is refused when it is loaded.
LINEAR_CLASSES = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
    "ColumnParallelLinearWithShardedLoRA",
    "QKVParallelLinearWithShardedLoRA",
    "MergedColumnParallelLinearWithShardedLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "MergedQKVParallelLinearWithShardedLoRA",
    "RowParallelLinearWithShardedLoRA",
)


def scale_rows(
    output: Tensor,  # (..., out), overwritten
    bias: Tensor | None,  # (out,), already in output
    scale: Tensor,  # (slots + 1, out) float32
    slots: Tensor,  # (at least tokens,) int64, -1 for the base model
) -> Tensor:
    """Compute d * output + (1 - d) * bias in place, with every token's own d, rounded once to the dtype of `output`."""
    rows = output.view(-1, output.shape[-1])
    factor = scale[slots[: rows.shape[0]]]  # (tokens, out)
    if bias is None:
        rows.mul_(factor)
        return output
    scaled = rows * factor  # float32, also for a bfloat16 output
    scaled.add_(factor.neg_().add_(1).mul_(bias))
    if scaled.dtype == output.dtype:
        return scaled.view(output.shape)
    rows.copy_(scaled)
    return output


def local_scale(layer: Any, scales: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """Return the part of full scales (out_i,) that this tensor-parallel rank needs, as (first row, values).

    `scales` holds one entry per weight that vLLM packed into the layer (q, k, v; gate, up), None where the
    adapter does not change a weight. The layer's own slice_lora_b selects the rows, as for B, except in a row-parallel
    layer, whose output is a partial sum over all rows before the all-reduce.
    """
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA

    columns = [None if scale is None else scale[:, None] for scale in scales]
    if not isinstance(layer, MergedColumnParallelLinearWithLoRA):
        (column,) = columns
        assert column is not None
        if layer.tp_size > 1 and not isinstance(layer, RowParallelLinearWithLoRA):
            column = layer.slice_lora_b(column)
        return [(0, column[:, 0])]
    if len(columns) == 1 and layer.n_slices > 1 and columns[0] is not None:
        columns = list(torch.split(columns[0], list(layer.base_layer.output_sizes)))
    if len(columns) != layer.n_slices:
        _, columns = layer.expand_packed_lora(columns, columns)
    if layer.tp_size > 1:
        columns = layer.slice_lora_b(columns)
    parts = []
    start = 0
    for width, column in zip(layer.output_slices, columns, strict=True):
        if column is not None:
            parts.append((start, column[:, 0]))
        start += width
    return parts


def with_row_scale(stock: Any, spare_slot: bool) -> Any:
    """Return a subclass of one of vLLM's LoRA linear classes that also scales rows.

    `spare_slot` adds a last slot of A and B that stays zero. vLLM's torch kernels (CPU) index with -1 for the base
    model, which is the last slot: up to 0.32, a base request in a batch with adapters is computed with the adapter of
    the last slot whenever that slot is in use.
    """

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        stock.create_lora_weights(self, max_loras + int(spare_slot), lora_config, model_config)
        self.row_scale = torch.ones(max_loras + 1, _output_width(self), dtype=torch.float32, device=self.device)

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        stock.set_mapping(self, punica_wrapper)
        # vLLM leaves this buffer uninitialised until the first batch; profiling runs read it earlier.
        punica_wrapper._token_lora_indices.fill_(-1)

    def reset_lora(self: Any, index: int) -> None:
        stock.reset_lora(self, index)
        self.row_scale[index].fill_(1)

    def set_row_scale(self: Any, index: int, scales: Sequence[Tensor | None]) -> None:
        row = self.row_scale[index]
        row.fill_(1)
        for start, values in local_scale(self, scales):
            row[start : start + values.shape[0]].copy_(values, non_blocking=True)

    def unscaled_apply(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = stock.apply(self, x, bias)
        return output

    def apply(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        output = unscaled_apply(self, x, bias)
        return scale_rows(output, bias, self.row_scale, self.punica_wrapper._token_lora_indices)

    return type(
        "RowScaled" + stock.__name__,
        (stock,),
        {
            "__doc__": f"{stock.__name__} with one row scale per adapter slot.",
            "__module__": __name__,
            "create_lora_weights": create_lora_weights,
            "set_mapping": set_mapping,
            "reset_lora": reset_lora,
            "set_row_scale": set_row_scale,
            "unscaled_apply": unscaled_apply,
            "apply": apply,
        },
    )


def _output_width(layer: Any) -> int:
    """Return the width of the output of `apply` on this rank: all rows in a row-parallel layer, else those of B."""
    from vllm.lora.layers import RowParallelLinearWithLoRA

    if isinstance(layer, RowParallelLinearWithLoRA):
        return int(layer.output_size)
    return sum(int(b.shape[2]) for b in layer.lora_b_stacked)
