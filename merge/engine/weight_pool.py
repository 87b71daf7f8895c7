"""Parallel map over weights: on the CPU one worker per core with one torch thread each, on a GPU one worker.

Torch's own threads make matrices of this size slower, and much slower on a machine that is shared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .devices import exact_products, one_thread

WeightMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@contextmanager
def weight_pool(device: torch.device) -> Iterator[WeightMap]:
    """Yield a function like `map` that runs on the pool and keeps the order; a failure cancels calls not yet begun."""
    count = max(1, len(os.sched_getaffinity(0))) if device.type == "cpu" else 1
    with (
        one_thread(),
        exact_products(device),
        ThreadPoolExecutor(count, "weight") as pool,
    ):
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
