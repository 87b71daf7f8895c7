"""verify OUT of an ONNX export: every file of it, the card and the manifest are as they were written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime_genai")

from adapter_merge.errors import FileFormatError
from adapter_merge.export.adding import add_adapters
from adapter_merge.outputs.integrity import check_integrity

pytestmark = pytest.mark.onnx


def test_an_export_is_unchanged_until_it_is_changed(
    switchable: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(switchable, tmp_path / "out"))
    found = check_integrity(folder, inputs=True)
    assert found.files == sum(path.is_file() for path in folder.rglob("*")) - 1
    add_adapters(folder, {"another": adapters["lora"]})
    assert check_integrity(folder).files == found.files + 1


CHANGES: dict[str, Callable[[Path], object]] = {
    "card": lambda folder: (folder / "README.md").write_text("another"),
    "graph": lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b" "),
    "adapter": lambda folder: next(folder.glob("*.onnx_adapter")).write_bytes(b""),
    "hidden": lambda folder: (folder / ".more").write_text(""),
    "manifest": lambda folder: (folder / "adapter_merge.json").write_text(
        (folder / "adapter_merge.json").read_text().replace('"switchable"', '"merged"')
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_found(switchable: Path, tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(switchable, tmp_path / "out"))
    CHANGES[what](folder)
    with pytest.raises(FileFormatError):
        check_integrity(folder)
