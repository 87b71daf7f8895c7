"""The last step of every output: its name, whatever else happens to that name meanwhile."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from merge_models import base_tensors, snapshot, write_base, write_lora

from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, MergeOptions
from adapter_merge.errors import OutputError
from adapter_merge.outputs.integrity import check_integrity
from adapter_merge.outputs.staging import check_space, nearest_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors()
    return write_base(tmp_path / "base", tensors), write_lora(tmp_path / "adapter", tensors)


@pytest.mark.parametrize(("job", "options"), [(merge, MergeOptions), (delta, DeltaOptions)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_merge_runs_is_not_replaced(
    tmp_path: Path, pair: tuple[Path, Path], overwrite: bool, job: object, options: type
) -> None:
    """A big merge takes long enough for somebody to put a folder of that name there."""
    out = tmp_path / "out"

    def progress(nbytes: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("mine")

    with pytest.raises(OutputError, match="not written by" if overwrite else "exists already"):
        job(*pair, out, options(overwrite=overwrite), progress=progress)  # type: ignore[operator]
    assert snapshot(out).keys() == {"precious"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("error", [OSError(5, "the disk fails"), KeyboardInterrupt()])
def test_an_output_that_cannot_be_replaced_stays(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Where two names cannot be exchanged in one step, a failure between the two steps undoes the first."""
    out = tmp_path / "out"
    merge(*pair, out, MergeOptions(dtype="float16"))
    before = snapshot(out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise error
        return real(self, target)

    libraries = ctypes.CDLL
    without_exchange = lambda name, **options: object() if name is None else libraries(name, **options)  # noqa: E731
    monkeypatch.setattr(ctypes, "CDLL", without_exchange)  # a C library that has no renameat2
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises((OutputError, KeyboardInterrupt)):
            merge(*pair, out, MergeOptions(overwrite=True))
    assert snapshot(out) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    merge(*pair, out, MergeOptions(overwrite=True))
    assert snapshot(out) != before
    check_integrity(out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("job", "options"), [(merge, MergeOptions), (delta, DeltaOptions)])
def test_a_run_killed_between_the_two_steps_is_mended_by_the_next(
    tmp_path: Path, pair: tuple[Path, Path], job: object, options: type
) -> None:
    out = tmp_path / "out"
    merge(*pair, out)
    before = snapshot(out)
    out.rename(tmp_path / ".out.old")  # what such a kill leaves
    with pytest.raises(OutputError, match="exists already"):
        job(*pair, out)  # type: ignore[operator]
    assert snapshot(out) == before
    out.rename(tmp_path / ".out.old")
    job(*pair, out, options(overwrite=True))  # type: ignore[operator]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_link_is_replaced_not_what_it_points_to(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    merge(*pair, elsewhere / "model")
    before = snapshot(elsewhere)
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    out.symlink_to(elsewhere / "model")
    assert nearest_folder(out) == tmp_path / "here"  # where the bytes will go, so where they need room
    check_space(out, 1)
    merge(*pair, out, MergeOptions(overwrite=True))
    assert not out.is_symlink()
    check_integrity(out)
    assert snapshot(elsewhere) == before
