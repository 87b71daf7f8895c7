"""Who may read an output: nobody who may not read all of its inputs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from merge_models import base_tensors, write_base, write_lora

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.extract import extract
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ExtractOptions, FactorOptions, MergeOptions, RestoreOptions
from adapter_merge.api.restore import restore

CPU, RANK = FactorOptions(device="cpu"), ExtractOptions(device="cpu", rank=4)
JOBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda base, adapter, out: merge(base, adapter, out, MergeOptions(keep_preimage=True)),
    "delta": lambda base, adapter, out: delta(base, adapter, out),
    "factor": lambda base, adapter, out: factor(base, adapter, out, CPU),
    "convert": lambda base, adapter, out: convert(adapter, out),
    "extract": lambda base, adapter, out: extract(base, base.parent / "tuned", out, RANK),
    "restore": lambda base, adapter, out: restore(base.parent / "tuned", out),
}  # fmt: skip


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(layers=1)
    base, adapter = write_base(tmp_path / "base", tensors, 2), write_lora(tmp_path / "adapter", tensors)
    for file in tmp_path.rglob("*.safetensors"):  # which safetensors 0.8 makes 0600 whatever the umask
        file.chmod(0o644)
    merge(base, adapter, tmp_path / "tuned", MergeOptions(keep_preimage=True))
    return base, adapter


@pytest.mark.parametrize("mode", [0o600, 0o640])
@pytest.mark.parametrize("job", JOBS)
def test_an_output_is_as_private_as_its_inputs(job: str, mode: int, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    file = {
        "convert": "adapter/adapter_model.safetensors",
        "extract": "tuned/model-00001-of-00002.safetensors",
        "restore": "tuned/model-00001-of-00002.safetensors",
    }.get(job, "base/model-00002-of-00002.safetensors")
    (tmp_path / file).chmod(mode)
    JOBS[job](*pair, tmp_path / "out")
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else mode), path


def test_while_it_is_built_too(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (adapter / "adapter_model.safetensors").chmod(0o600)
    seen: set[int] = set()
    for job in (merge, delta):
        job(base, adapter, tmp_path / job.__name__,
            progress=lambda _: seen.update(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob(".*.partial")))  # type: ignore[operator]  # fmt: skip
    assert seen == {0o700}


def test_hard_links_of_the_base_keep_their_mode(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """They are the base's own files."""
    base, adapter = pair
    (adapter / "adapter_model.safetensors").chmod(0o600)
    restore(tmp_path / "tuned", tmp_path / "out", RestoreOptions(base=base, link="hardlink"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in base.glob("*.safetensors")} == {0o644}
    merge(base, adapter, tmp_path / "merged", MergeOptions(link="hardlink"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in base.glob("*.safetensors")} == {0o644}


def test_a_private_side_file_stays_private(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (base / "tokenizer.json").chmod(0o600)
    merge(base, adapter, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "tokenizer.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "out" / "chat_template.jinja").stat().st_mode) == 0o644
