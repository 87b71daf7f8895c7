"""Settings of one execution of a plan, passed to its schedule and its workers as one value."""

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
    """Recorder of the base's bytes that a merge changes (preimage.py)."""

    def record(self, shard: ShardPlan, job: TensorJob, first: int, before: Tensor, after: Tensor | None) -> None:
        """Record that bytes `before` (n,) uint8, from byte `first` of the base's tensor, became `after`.

        `after` is None where the output does not have the tensor's bytes.
        """


@dataclass(frozen=True)
class RunSettings:
    """Device, ways of writing files, and callbacks of one execution."""

    folder: Path  # of the output
    device: torch.device  # the first of the run's devices
    workers: int  # of all devices together
    block_bytes: int  # of one block in the arithmetic's dtype
    hashing: bool  # sha256 of every file read from end to end, and of every file written
    direct: bool  # write past the page cache where the file system can
    link: str  # how shards that no adapter changes are made: copied or linked (links.py)
    is_delta: bool  # write W' - W0 instead of W'
    progress: Progress | None
    recorder: Recorder | None
