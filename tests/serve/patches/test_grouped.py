"""The grouped LoRA products: against float64 per token, and against vLLM's own kernels in its own wrapper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adapter_merge.serve.patches.cpu_kernel import add_products, group_tokens

IN, OUT, RANK, SLOTS = 24, 40, 4, 4


@pytest.mark.parametrize(
    "slots",
    [
        [-1, -1, -1],
        [2, 2, 2, 2],
        [-1, 0, 0, 3, 3, 3, -1],  # consecutive, as requests lie in a batch
        [1, -1, 0, 1, 3, 0, 1],  # mixed
        [0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(slots: list[int], dtype: torch.dtype) -> None:
    """In columns of a wider output: each token gets its slot's product, base rows and the rest keep every bit."""
    generator = torch.Generator().manual_seed(len(slots))
    x, a, b, y = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((len(slots), IN), (SLOTS, 1, RANK, IN), (SLOTS, 1, OUT, RANK), (len(slots), OUT + 9))
    )
    wanted = y.double()
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[token, 5 : 5 + OUT] += b[slot, 0].double() @ (a[slot, 0].double() @ x[token].double())
    before = y.clone()
    add_products(y[:, 5 : 5 + OUT], x, a, b, group_tokens(slots))
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
    else:
        torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=0.5)  # x A^T is rounded, as vLLM rounds it
    base = torch.tensor(slots) < 0
    assert torch.equal(y[base], before[base])
    assert torch.equal(y[:, :5], before[:, :5])
    assert torch.equal(y[:, 5 + OUT :], before[:, 5 + OUT :])


def test_groups_partition_the_tokens() -> None:
    slots = [1, -1, 0, 1, 3, 3, 1]
    found = torch.full((len(slots),), -1)
    for slot, tokens in group_tokens(slots):
        assert (found[tokens] == -1).all(), "a token in two groups"
        found[tokens] = slot
    assert found.tolist() == slots


COMPARE = """
import torch
from types import SimpleNamespace
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Wrapper
from adapter_merge.serve.patches import cpu_kernel

stock = Wrapper.add_lora_linear
print("installed:", cpu_kernel.install(), Wrapper.add_lora_linear is not stock)
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator)
wrapper = Wrapper(max_num_batched_tokens=64, max_batches=16, device="cpu")
ids = [7, 3, 9, None]  # the adapter in each slot; a fourth one that is empty keeps zeros for the base
worst = 0.0
for prefill in (False, True):
    for trial in range(20):
        mapping = [[0, 7, 3, 9][i] for i in torch.randint(4, (11,), generator=generator)]
        if prefill:
            mapping = sorted(mapping)
        wrapper.update_metadata(
            SimpleNamespace(index_mapping=mapping, prompt_mapping=mapping, is_prefill=prefill), ids, 4, 32
        )
        widths = (16, 8, 8)
        a = tuple(draw(4, 1, 4, 12) for _ in widths)
        b = tuple(draw(4, 1, width, 4) for width in widths)
        for factor in (*a, *b):
            factor[3] = 0
        x, y = draw(11, 12), draw(11, 32)
        ours, theirs = y.clone(), y.clone()
        wrapper.add_lora_linear(ours, x, a, b, 1.0, widths)
        stock(wrapper, theirs, x, a, b, 1.0, widths)
        worst = max(worst, float((ours - theirs).abs().max()))
        assert float((theirs - y).abs().max()) > 1
print("worst:", worst)
# What is no batch of tokens goes to vLLM's own kernel: here the mapping tells of 11 tokens and 5 come.
try:
    wrapper.add_lora_linear(draw(5, 32), draw(5, 12), a, b, 1.0, widths)
except Exception as error:
    print("other tokens:", type(error).__name__)
"""


@pytest.mark.vllm
def test_against_vllms_own_kernels(run_python: Callable[[str], str]) -> None:
    """vLLM's wrapper, its metadata for prefill and decode, and its gathering kernels as the oracle."""
    out = run_python(COMPARE)
    assert "installed: True True" in out
    assert float(out.split("worst:")[1].split()[0]) < 1e-4
    assert "other tokens: " in out
