"""Pieces of one output file: files with some of its tensors, which several machines write, and their joining."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapter_merge.storage.safetensors_header import layout

from .plan import ShardPlan, TensorJob

COPY_BYTES = 8 << 20


def divide(shard: ShardPlan, limit: int) -> tuple[ShardPlan, ...]:
    """Return files of at most `limit` bytes of tensors that hold the tensors of `shard` in its order.

    A larger tensor gets a file of its own. `shard` must not read an input file from end to end (source is None).
    """
    assert shard.source is None
    groups: list[list[TensorJob]] = [[]]
    size = 0
    for job in shard.jobs:
        if groups[-1] and size + job.place.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += job.place.nbytes
    pieces = []
    for number, jobs in enumerate(groups, 1):
        file = f"{shard.file}.{number:05d}-of-{len(groups):05d}"
        header, places = layout(Path(file), [(job.place.name, job.place.dtype, job.place.shape) for job in jobs])
        moved = tuple(replace(job, place=place) for job, place in zip(jobs, places, strict=True))
        pieces.append(ShardPlan(file, header, moved))
    return tuple(pieces)


def join(folder: Path, shard: ShardPlan, pieces: Sequence[ShardPlan]) -> str:
    """Write `shard` into `folder` from its `pieces` there, which are removed one by one; return its sha256.

    The file is the one that `execute` writes for `shard`, byte for byte.
    """
    digest = hashlib.sha256(shard.header)
    with (folder / shard.file).open("xb") as joined:
        joined.write(shard.header)
        for piece in pieces:
            with (folder / piece.file).open("rb") as stream:
                stream.seek(len(piece.header))
                while data := stream.read(COPY_BYTES):
                    joined.write(data)
                    digest.update(data)
            (folder / piece.file).unlink()
        joined.flush()
        os.fsync(joined.fileno())
    return digest.hexdigest()
