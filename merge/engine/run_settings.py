"""What one execution of a plan is told: one value, handed through to its schedule and its workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .plan import ShardPlan, TensorJob

Progress = Callable[[int], None]  # called with the bytes just written, from any thread


class Recorder(Protocol):
    """Keeps what a merge overwrites (preimage.py)."""

    def record(self, shard: ShardPlan, job: TensorJob, first: int, before: Tensor, after: Tensor | None) -> None:
        """Bytes `before` (n,) uint8 from byte `first` of the base's tensor became `after`, or are gone (None)."""


@dataclass(frozen=True)
class RunSettings:
    """Where a plan is executed, how files are written, and who is told."""

    folder: Path  # of the output
    device: torch.device  # the first of the run's devices
    workers: int  # of all devices together
    block_bytes: int  # of one block's arithmetic
    hashing: bool  # sha256 of every file read from end to end, and of every file written
    direct: bool  # write past the page cache where the file system can
    link: str  # how shards that no adapter touches get there (links.py)
    is_delta: bool  # W' - W0 is written instead of W'
    progress: Progress | None
    recorder: Recorder | None
