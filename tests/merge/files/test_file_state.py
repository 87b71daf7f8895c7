"""States of weights files: another one after every write, the hub's own hash in its cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from merge_models import base_tensors, write_base

from adapter_merge.storage.checkpoint import file_state, open_checkpoint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(layers=1), 1) / "model.safetensors"


def test_a_write_that_is_put_back(file: Path) -> None:
    before, state = file.stat(), open_checkpoint(file.parent).state
    assert open_checkpoint(file.parent).state == state
    data = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert open_checkpoint(file.parent).state != state


def test_the_hubs_cache_states_hashes(tmp_path: Path, file: Path) -> None:
    states = []
    for name in ("one", "two"):
        blob = tmp_path / name / "blobs" / ("ab" * 32)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(file.read_bytes())
        link = tmp_path / name / "snapshots" / "main" / file.name
        link.parent.mkdir(parents=True)
        link.symlink_to(blob)
        states.append(file_state(link))
    assert states == ["ab" * 32] * 2
