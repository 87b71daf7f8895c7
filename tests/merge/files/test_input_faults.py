"""Inputs that change while they are used, and inputs that the system does not let be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.extract import extract
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, DeltaOptions, ExtractOptions, FactorOptions, MergeOptions
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
    """Another file under its name for a while, and the first one back; a file has the name at every moment."""
    aside, other = file.with_name("aside"), file.with_name("other")
    other.write_bytes(file.read_bytes()[:-8] + bytes(8))
    aside.hardlink_to(file)
    other.replace(file)
    aside.replace(file)


@pytest.mark.parametrize("change", [rewrite, exchange])
@pytest.mark.parametrize("name", ["base/*.safetensors", "adapter/adapter_model.safetensors",
                                  "adapter/adapter_config.json", "base/config.json"])  # fmt: skip
@pytest.mark.parametrize(("job", "options"), [(merge, MergeOptions), (delta, DeltaOptions)])
def test_an_input_that_changes_and_is_put_back(
    job: object, options: type, name: str, change: object, tmp_path: Path, base: Path, adapter: Path
) -> None:
    done: list[int] = []
    file = min(tmp_path.glob(name))

    def progress(nbytes: int) -> None:
        if not done:
            done.append(nbytes)
            change(file)  # type: ignore[operator]

    with pytest.raises(FileFormatError, match="changed while it was read") as caught:
        job(base, adapter, tmp_path / "out", options(device="cpu"), progress=progress)  # type: ignore[operator]
    assert done and str(file) in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]


def test_another_name_for_an_input_is_no_change(tmp_path: Path, base: Path, adapter: Path) -> None:
    def progress(nbytes: int) -> None:
        if not (tmp_path / "link").exists():
            (tmp_path / "link").hardlink_to(min(base.glob("*.safetensors")))

    merge(base, adapter, tmp_path / "out", MergeOptions(device="cpu", workers=1), progress=progress)
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


@pytest.mark.preloaded("torch")
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


class Watcher:
    """Calls `change` once, when `trigger` says so of an event that Python's audit hooks report; it stays unpatched."""

    def __init__(self) -> None:
        self.trigger: Callable[[str, tuple[Any, ...]], bool] | None = None
        self.change: Callable[[], object] = lambda: None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.trigger is not None and event in ("open", "os.mkdir") and self.trigger(event, arguments):
            self.trigger = None
            self.change()


WATCHER = Watcher()  # a hook cannot be removed: one for all tests


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    yield WATCHER
    WATCHER.trigger = None


def finetuned(base: Path) -> Path:
    model = pico.pico_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.add_(0.01 * torch.outer(torch.arange(len(parameter)), torch.ones(parameter.shape[1])))
    return pico.save_base(model, base.parent / "finetuned")


JOBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda base, adapter, out: merge(base, adapter, out, MergeOptions(device="cpu")).as_json(),
    "delta": lambda base, adapter, out: delta(base, adapter, out, DeltaOptions(device="cpu")).as_json(),
    "factor": lambda base, adapter, out: factor(base, adapter, out, FactorOptions(device="cpu")).as_json(),
    "factor without base": lambda base, adapter, out: factor(None, adapter, out, FactorOptions(device="cpu")).as_json(),
    "convert": lambda base, adapter, out: convert(adapter, out, ConvertOptions(base=base)).as_json(),
    "convert without base": lambda base, adapter, out: convert(adapter, out).as_json(),
    "extract": lambda base, adapter, out: extract(
        base, base.parent / "finetuned", out, ExtractOptions(device="cpu", rank=4)
    ).as_json(),
}
READ = [
    (job, name)
    for job in JOBS
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base/config.json",
                 "base/model-00001-of-*.safetensors", "base/model.safetensors.index.json",
                 "finetuned/model-00001-of-*.safetensors")
    if not ("without" in job and "base/" in name)
    and ("finetuned" in name if job == "extract" and "adapter" in name else "finetuned" not in name)
]  # fmt: skip


@pytest.mark.parametrize("moment", ["at its second opening", "when the output is begun"])
@pytest.mark.parametrize(("job", "name"), READ)
def test_a_change_in_any_job(
    job: str, name: str, moment: str, tmp_path: Path, base: Path, adapter: Path, watcher: Watcher
) -> None:
    """Files are put back, so that only the first look at them tells; that look comes before the first reading."""
    if job == "extract":
        finetuned(base)
    file = min(tmp_path.glob(name))
    opened: list[object] = []

    def trigger(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "os.mkdir":  # for what is opened once alone
            return ".out.partial" in str(arguments[0])
        if str(arguments[0]) == str(file) and moment == "at its second opening":
            opened.append(arguments)
        return len(opened) == 2

    watcher.trigger, watcher.change = trigger, lambda: rewrite(file)
    with pytest.raises(FileFormatError, match="changed while it was read") as caught:
        JOBS[job](base, adapter, tmp_path / "out")
    assert watcher.trigger is None and str(file) in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]


def test_a_changed_file_with_another_name(tmp_path: Path, base: Path, adapter: Path, watcher: Watcher) -> None:
    """A hard link alone excuses no change of an adapter's file."""
    file = adapter / "adapter_model.safetensors"

    def change() -> None:
        rewrite(file)
        (tmp_path / "link").hardlink_to(file)

    watcher.trigger, watcher.change = lambda event, arguments: event == "os.mkdir", change
    with pytest.raises(FileFormatError, match="changed while it was read"):
        factor(base, adapter, tmp_path / "out", FactorOptions(device="cpu"))


COMMANDS: dict[str, Callable[[Path | str, Path | str, Path | str], list[str]]] = {
    "merge": lambda base, adapter, out: ["merge", str(base), str(adapter), "-o", str(out)],
    "delta": lambda base, adapter, out: ["delta", str(base), str(adapter), "-o", str(out)],
    "factor": lambda base, adapter, out: ["factor", str(base), str(adapter), "-o", str(out)],
    "convert": lambda base, adapter, out: ["convert", str(adapter), "--base", str(base), "-o", str(out)],
}


def run(arguments: list[str], before: str = "", **environment: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the object on stdout, stderr) of the command line in a process of its own, after `before`."""
    program = f"import os, resource\n{before}\nfrom adapter_merge.cli.main import main; main()"
    command = [sys.executable, "-c", program, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | environment)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr.decode("utf-8", "backslashreplace")


@pytest.mark.preloaded("torch")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written(command: str, tmp_path: Path, base: Path, adapter: Path) -> None:
    before = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    status, content, stderr = run(COMMANDS[command](base, adapter, tmp_path / "out"), before)
    assert status == 1 and content["error"]["kind"] == "OutputError", stderr
    assert f"{tmp_path / 'out'}: cannot be written (File too large)" in stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]


@pytest.mark.preloaded("torch")
@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize("which", ["base", "adapter", "out"])
def test_names_that_are_not_utf8(command: str, which: str, tmp_path: Path, base: Path, adapter: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/name-\xff"))
    paths = {"base": base, "adapter": adapter, "out": tmp_path / "out"}
    if which != "out":
        paths[which].rename(strange)
    paths[which] = strange
    status, content, stderr = run(COMMANDS[command](**paths))
    assert status == 1 and content["error"]["kind"] == ("OutputError" if which == "out" else "InputError"), stderr
    assert "name-\\xff" in stderr and "not UTF-8" in stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("command", ["merge"])
def test_a_locale_without_unicode(command: str, tmp_path: Path, base: Path, adapter: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, _, stderr = run(COMMANDS[command](base, adapter, tmp_path / "out"), **ascii_only)
    assert status == 0 and (tmp_path / "out").is_dir(), stderr
    status, content, stderr = run(COMMANDS[command](base, adapter, tmp_path / "größer"), **ascii_only)
    assert status == 1 and content["error"]["kind"] == "OutputError" and "UTF-8 locale" in stderr
