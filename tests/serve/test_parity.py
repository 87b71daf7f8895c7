"""Real vLLM against the Hugging Face model with merged weights in float64: every kind of adapter, exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from world import RunEngine, World, prompts

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


def test_offline_from_adapters_as_trained(world: World, run_engine: RunEngine, tmp_path: Path) -> None:
    """`lora_requests` in front of vllm.LLM: conversion by this package, parity with the formulas."""
    names = ["lora-1", "dcft-1", "dora-1", "dude-1", "dude-2"]
    batch = requests_of([None, *names])
    env = {"ADAPTER_MERGE_CACHE": str(tmp_path / "cache")}
    result = run_engine(world.base, world.raws(*names), [batch], env=env, offline=True)
    worst = check(world, batch, result["answers"][0])
    print(world.family, {name or "base": f"{value:.1e}" for name, value in worst.items()})


def test_bfloat16_stays_near_a_merged_model(qwen2: World, run_engine: RunEngine, tmp_path: Path) -> None:
    """In bfloat16 both a served DuDe adapter and its merged model, served alone, round: errors of one size.

    The merged model rounds once more in its weights, the served one in the output of the base's part.
    """
    adapter = qwen2.adapters["dude-1"]
    merged = tmp_path / "merged"
    shutil.copytree(qwen2.base, merged)
    weights = {**qwen2.oracle.weights, **adapter.merged}
    tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    several = prompts(12, 24, seed=21)
    truth = [qwen2.expected("dude-1", prompt, 1) for prompt in several]
    engine = {"dtype": "bfloat16", "max_loras": 2, "max_lora_rank": 16}

    def error(base: Path, folders: dict[str, Path], name: str | None) -> float:
        batch = [{"adapter": name, "prompt": prompt, "count": 1} for prompt in several]
        answers = run_engine(base, folders, [batch], engine)["answers"][0]
        differences = [
            abs(answer["logprobs"][0] - logprobs[0]) for answer, (_, logprobs) in zip(answers, truth, strict=True)
        ]
        return sum(differences) / len(differences)

    served = error(qwen2.base, qwen2.folders("dude-1"), "dude-1")
    alone = error(merged, {}, None)
    print(f"bfloat16: served {served:.1e}, merged {alone:.1e}")
    assert served <= 2 * alone + 1e-3
