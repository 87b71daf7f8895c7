"""Real vLLM against the Hugging Face model with merged weights in float64: every kind of adapter, exactly."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import RunEngine, World, prompts

pytestmark = pytest.mark.vllm

COUNT = 16


def requests_of(names: list[str | None], length: int = 20) -> list[dict[str, Any]]:
    return [
        {"adapter": name, "prompt": prompt, "count": COUNT}
        for name, prompt in zip(names, prompts(len(names), length), strict=True)
    ]


def check(world: World, batch: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str | None, float]:
    """Every greedy token equal, every log-probability within 1e-3; the largest difference by adapter."""
    worst: dict[str | None, float] = {}
    for request, answer in zip(batch, answers, strict=True):
        tokens, logprobs = world.expected(request["adapter"], request["prompt"], request["count"])
        assert answer["tokens"] == tokens, f"{request['adapter']}: {answer['tokens']} instead of {tokens}"
        difference = max(abs(a - b) for a, b in zip(answer["logprobs"], logprobs, strict=True))
        worst[request["adapter"]] = max(worst.get(request["adapter"], 0.0), difference)
    assert max(worst.values()) <= 1e-3, worst
    return worst


def test_base_and_every_kind_in_one_full_batch(world: World, run_engine: RunEngine, record_property: Any) -> None:
    """All slots in use, base requests among them: each request gets its own adapter and the base none."""
    names: list[str | None] = [None, *world.adapters, None]
    batch = requests_of(names)
    result = run_engine(world.base, world.folders(), [batch], {"max_loras": len(world.adapters), "max_lora_rank": 16})
    assert result["plugin"] == "installed"
    worst = check(world, batch, result["answers"][0])
    for name, difference in worst.items():
        record_property(f"{world.family} {name or 'base'}", f"{difference:.1e}")
        print(f"{world.family} {name or 'base'}: {difference:.1e}")
    # The adapters are strong: had one been left out, its tokens would be the base's.
    for request in batch:
        if request["adapter"] is not None:
            assert (
                world.expected(None, request["prompt"], COUNT)[0]
                != world.expected(request["adapter"], request["prompt"], COUNT)[0]
            )
