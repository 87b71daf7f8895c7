"""Adapters of experts in vLLM, with its own loading, packing and slots, and a kernel in plain torch (experts_cpu/)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import vllm_environment

HERE = Path(__file__).parent
COUNT = 8
COMMON = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts_per_tok": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    "down": {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": ["down_proj"]},
}
pytestmark = pytest.mark.vllm


def answers_of(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy tokens of a live model and their log-probabilities."""
    tokens, found = list(prompt), []
    with torch.no_grad():
        for _ in range(COUNT):
            logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)
            tokens.append(int(logprobs.argmax()))
            found.append(float(logprobs.max()))
    return tokens[len(prompt) :], found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_two_adapters_and_the_base_in_one_batch(family: str, tmp_path: Path) -> None:
    """Every token is that of PEFT's live model: all projections, one projection, and none in one batch."""
    import peft
    import transformers

    kind, config = {
        "mixtral": (
            transformers.MixtralForCausalLM,
            transformers.MixtralConfig(**COMMON, intermediate_size=64, num_local_experts=4),
        ),
        "qwen3_moe": (
            transformers.Qwen3MoeForCausalLM,
            transformers.Qwen3MoeConfig(
                **COMMON, intermediate_size=128, moe_intermediate_size=64, num_experts=4, norm_topk_prob=True
            ),
        ),
    }[family]
    expected: dict[str | None, tuple[list[int], list[float]]] = {}
    prompts: dict[str | None, list[int]] = {None: [1, 2, 3, 4, 5], "all": [9, 8, 7, 6], "down": [1, 2, 3, 4, 5]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers, about what is meant here
        torch.manual_seed(0)
        kind(config).float().save_pretrained(tmp_path / "base")
        for name, settings in ADAPTERS.items():
            model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base").float(), peft.LoraConfig(**settings))
            for parameter, weight in model.named_parameters():
                if "lora_" in parameter:
                    torch.nn.init.normal_(weight, std=0.25)
            model.save_pretrained(tmp_path / name)
            expected[name] = answers_of(model, prompts[name])
            with model.disable_adapter():
                expected[None] = answers_of(model, prompts[None])
                assert answers_of(model, prompts[name])[0] != expected[name][0], "an adapter without an effect"
    batch = [{"adapter": name, "prompt": prompts[name], "count": COUNT} for name in (None, "all", "down", None)]
    job = {
        "engine": {"model": str(tmp_path / "base"), "max_model_len": 64, "max_num_batched_tokens": 64},
        "adapters": {name: str(tmp_path / name) for name in ADAPTERS},
        "batches": [batch],
        "offline": True,
    }
    paths = [str(HERE / "experts_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(HERE / "engine.py"), str(tmp_path / "answers.json")],
        input=json.dumps(job),
        env=vllm_environment(PYTHONPATH=os.pathsep.join(paths), ADAPTER_MERGE_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for request, answer in zip(batch, json.loads((tmp_path / "answers.json").read_text())["answers"][0], strict=True):
        tokens, logprobs = expected[request["adapter"]]
        assert answer["tokens"] == tokens, request
        assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-3)
