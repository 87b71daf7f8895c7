"""Inputs that change while they are used, and inputs that the system does not let be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pico
import pytest

from adapter_merge.api.merge import delta, merge
from adapter_merge.errors import FileFormatError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico.save_base(pico.pico_model("llama"), tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(file: Path) -> None:
    """Other values, then the old ones, with the old times: by its content, size and mtime nothing has happened."""
    about, content = file.stat(), file.read_bytes()
    for data in (content[:-8] + bytes(8), content):
        with file.open("r+b") as stream:
            stream.write(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.read_bytes()) == (about.st_mtime_ns, content)


def exchange(file: Path) -> None:
    """Another file under its name for a while, and the first one back."""
    aside, other = file.with_name("aside"), file.with_name("other")
    other.write_bytes(file.read_bytes()[:-8] + bytes(8))
    file.rename(aside)
    other.rename(file)
    file.rename(other)
    aside.rename(file)


@pytest.mark.parametrize("change", [rewrite, exchange])
@pytest.mark.parametrize("name", ["base/*.safetensors", "adapter/adapter_model.safetensors",
                                  "adapter/adapter_config.json", "base/config.json"])  # fmt: skip
@pytest.mark.parametrize("job", [merge, delta])
def test_an_input_that_changes_and_is_put_back(
    job: object, name: str, change: object, tmp_path: Path, base: Path, adapter: Path
) -> None:
    done: list[int] = []
    file = min(tmp_path.glob(name))

    def progress(nbytes: int) -> None:
        if not done:
            done.append(nbytes)
            change(file)  # type: ignore[operator]

    with pytest.raises(FileFormatError, match="changed while it was read") as caught:
        job(base, adapter, tmp_path / "out", device="cpu", progress=progress)  # type: ignore[operator]
    assert done and str(file) in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]


def test_another_name_for_an_input_is_no_change(tmp_path: Path, base: Path, adapter: Path) -> None:
    def progress(nbytes: int) -> None:
        if not (tmp_path / "link").exists():
            (tmp_path / "link").hardlink_to(min(base.glob("*.safetensors")))

    merge(base, adapter, tmp_path / "out", device="cpu", progress=progress, workers=1)
    assert (tmp_path / "link").exists()


def unreadable(kind: str, file: Path) -> None:
    """Put in the file's place what the system refuses to read, without a patch of anything."""
    file.unlink()
    if kind == "EIO":
        file.symlink_to("/proc/self/mem")  # opens, and fails at the first read
    elif kind == "ELOOP":
        file.symlink_to(file)
    elif kind == "EISDIR":
        file.mkdir()
    elif kind == "ENAMETOOLONG":
        file.symlink_to("x" * 300)


@pytest.mark.parametrize("kind", ["EIO", "ELOOP", "EISDIR", "ENAMETOOLONG"])
@pytest.mark.parametrize("name", ["base/*.safetensors", "base/config.json", "adapter/adapter_model.safetensors",
                                  "adapter/adapter_model.bin", "adapter/adapter_config.json"])  # fmt: skip
def test_errors_of_the_system_are_no_bugs(kind: str, name: str, tmp_path: Path, base: Path, adapter: Path) -> None:
    if name.endswith(".bin"):
        (adapter / "adapter_model.safetensors").rename(tmp_path / name)
    where = min(tmp_path.glob(name))
    unreadable(kind, where)
    program = "from adapter_merge.cli.main import main; main()"
    command = [sys.executable, "-c", program, "merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if kind != "EIO" and name == "base/config.json" and done.returncode == 0:
        pytest.fail("merged without the config")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and error["kind"] != "Bug", done.stderr
    assert str(where) in done.stderr or str(where.parent) in done.stderr
    assert not (tmp_path / "out").exists()
