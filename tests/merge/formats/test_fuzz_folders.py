"""A small run of the fuzzer; the long one is `python tests/merge/fuzz_folders.py --cases 20000`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_folders import base_model, fuzz, seeds

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.formats.stated_settings import ReadOptions


@pytest.mark.parametrize("kind", sorted(seeds()))
def test_the_unchanged_adapters_are_well_formed(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, data in seeds()[kind].items():
        (tmp_path / "a" / name).write_bytes(data)
    random = kind in ("pissa", "dude", "pissa, safe")  # random factors are evidence of nothing
    base_kind = "original" if random else None
    reading = ReadOptions(force=True) if random or kind == "mytransformers" else None
    options = MergeOptions(device="cpu", base_kind=base_kind, reading=reading)
    merge(base_model(tmp_path / "base"), tmp_path / "a", tmp_path / "out", options)


def test_changed_adapters_are_refused_or_merged() -> None:
    found: list[str] = []
    outcomes = fuzz(400, seed=1, report=found.append)
    assert not found, "\n".join(found)
    assert outcomes["refused"] > 100 and outcomes["merged"] > 20
