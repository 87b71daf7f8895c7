"""Pipeline parallelism with LoRA in vLLM's CPU build.

Every stage after the first receives its input into tensors that vLLM's GPU workers allocate in their profiling run. The
CPU worker only makes that run to warm up torch.compile, and its platform disables compilation when LoRA is on (0.28 to
0.32). The first request then fails with `assert self.intermediate_tensors is not None`, with or without an adapter.
This patch allocates the tensors when they are first needed. Other platforms do not need it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

PARAMETERS = ["self", "num_tokens", "intermediate_tensors", "sync_self"]


def install() -> bool:
    """Wrap the CPU model runner; return False, without a change, for an unknown version of it."""
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        original = CPUModelRunner.sync_and_gather_intermediate_tensors
        is_known = list(inspect.signature(original).parameters) == PARAMETERS
    except (ImportError, AttributeError, ValueError):
        return False
    if is_known:
        CPUModelRunner.sync_and_gather_intermediate_tensors = wrap(original)
    return is_known


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap GPUModelRunner.sync_and_gather_intermediate_tensors (`original`): allocate missing tensors first."""

    def sync_and_gather_intermediate_tensors(
        self: Any, num_tokens: int, intermediate_tensors: Any, sync_self: bool
    ) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, num_tokens, intermediate_tensors, sync_self)

    return sync_and_gather_intermediate_tensors
