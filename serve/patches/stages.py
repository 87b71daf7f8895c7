"""Pipeline parallelism with LoRA in vLLM's CPU build.

A stage after the first one receives its input into tensors that vLLM's GPU workers allocate in their profiling run.
The CPU worker makes that run only to warm up torch.compile, and its platform switches compilation off as soon as LoRA
is on (0.28 to 0.32): the first request then ends in `assert self.intermediate_tensors is not None`, with any adapter
and with none. Here the tensors are allocated when they are first needed. Other platforms never come to that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

PARAMETERS = ["self", "num_tokens", "intermediate_tensors", "sync_self"]


def install() -> bool:
    """Wrap the CPU model runner; False, and nothing changed, where it is not the one that is known."""
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        original = CPUModelRunner.sync_and_gather_intermediate_tensors
        known = list(inspect.signature(original).parameters) == PARAMETERS
    except (ImportError, AttributeError, ValueError):
        return False
    if known:
        CPUModelRunner.sync_and_gather_intermediate_tensors = wrap(original)
    return known


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is GPUModelRunner.sync_and_gather_intermediate_tensors."""

    def sync_and_gather_intermediate_tensors(
        self: Any, num_tokens: int, intermediate_tensors: Any, sync_self: bool
    ) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, num_tokens, intermediate_tensors, sync_self)

    return sync_and_gather_intermediate_tensors
