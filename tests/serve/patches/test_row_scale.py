"""The scale alone: against float64, and as one graph with static buffers.

vLLM's CPU platform compiles nothing once LoRA is on, and there is no CUDA device here: that a layer works under
torch.compile and CUDA graphs rests on this, one graph without a break that reads its buffers anew each time.
"""

from __future__ import annotations

import pytest
import torch

from adapter_merge.serve.patches.row_scale import scale_rows

OUT, SLOTS, MOST = 24, 3, 16


def inputs(
    tokens: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(tokens, OUT, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype)
    scale = 1 + torch.randn(SLOTS + 1, OUT, generator=generator)
    scale[-1] = 1
    slots = torch.randint(-1, SLOTS, (MOST,), generator=generator)
    return output, bias, scale, slots


def expected(output: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """d (y - bias) + bias in float64, rounded once."""
    factor = scale.double()[slots[: output.shape[0]]]
    shift = torch.zeros(OUT).double() if bias is None else bias.double()
    return (factor * (output.double() - shift) + shift).to(output.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(dtype: torch.dtype, biased: bool) -> None:
    output, bias, scale, slots = inputs(11, dtype)
    given = bias if biased else None
    wanted = expected(output, given, scale, slots)
    before = output.clone()
    result = scale_rows(output, given, scale, slots)
    torch.testing.assert_close(result, wanted, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)
    base = slots[:11] == -1
    assert base.any()
    assert torch.equal(result[base], before[base]), "requests for the base keep every bit"


@pytest.mark.parametrize("biased", [False, True])
def test_one_graph_and_static_buffers(biased: bool) -> None:
    """fullgraph: a value read on the host would break it. Another adapter in the slot, another batch: no new graph."""
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(scale_rows, fullgraph=True, dynamic=True, backend=count)
    _, bias, scale, slots = inputs(11, torch.float32)
    given = bias if biased else None
    for seed, tokens in enumerate((11, 5, 16)):
        output, _, new_scale, new_slots = inputs(tokens, torch.float32, seed)
        scale.copy_(new_scale)
        slots.copy_(new_slots)
        wanted = expected(output, given, scale, slots)
        torch.testing.assert_close(compiled(output, given, scale, slots), wanted, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
