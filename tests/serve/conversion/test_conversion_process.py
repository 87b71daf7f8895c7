"""Conversions in a process of their own: the same folders, and limits that hold whatever an adapter does."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World

from adapter_merge.errors import AdapterError, FileFormatError, InputError, UnsupportedError
from adapter_merge.files.locks import lock_file
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.processes import ConversionProcess, Limits
from adapter_merge.serve.conversion.served_folder import Converter


@pytest.fixture(scope="module")
def process(qwen2: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConversionProcess]:
    made = ConversionProcess(str(qwen2.base), Cache(tmp_path_factory.mktemp("cache")), Limits())
    yield made
    made.close()


def pid_of(process: ConversionProcess) -> int:
    assert process.process is not None
    return process.process.pid


def test_the_same_folder_as_without_a_process(qwen2: World, process: ConversionProcess, tmp_path: Path) -> None:
    raw = qwen2.adapters["dude-1"].raw
    made, wanted = process.obtain(raw), Converter(qwen2.base, Cache(tmp_path)).obtain(raw)
    assert made.seconds is not None
    assert (made.folder.name, made.rank, made.form, made.origin) == (
        wanted.folder.name,
        wanted.rank,
        wanted.form,
        wanted.origin,
    )
    for file in wanted.folder.glob("*.safetensors"):
        assert file.read_bytes() == (made.folder / file.name).read_bytes()
    number = pid_of(process)
    again = process.obtain(raw)
    assert (again.folder, again.seconds, pid_of(process)) == (made.folder, None, number)
    assert process.obtain(made.folder).folder == made.folder
    assert not process.cache.clear()[0], "held, by this process"
    for served in (made, again):
        served.release()


def test_errors_are_those_of_the_conversion(process: ConversionProcess, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        process.obtain(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileFormatError, match="JSON"):
        process.obtain(tmp_path)
    with pytest.raises(InputError, match="UTF-8"):
        process.obtain(os.fsdecode(b"/\xff"))


def test_too_little_memory(qwen2: World, tmp_path: Path) -> None:
    process = ConversionProcess(str(qwen2.base), Cache(tmp_path), Limits(nbytes=500_000))
    try:
        with pytest.raises(UnsupportedError, match="GB of memory") as raised:
            process.obtain(qwen2.adapters["dude-1"].raw)
        assert "conversion-memory" in str(raised.value)
    finally:
        process.close()


def locked(process: ConversionProcess, qwen2: World, name: str) -> int:
    """The lock of the entry, under which a conversion waits for ever."""
    key = Converter(qwen2.base, process.cache).outline(qwen2.adapters[name].raw).key
    return lock_file(process.cache.root / f"{key}.lock", fcntl.LOCK_EX)


@pytest.mark.slow
def test_too_much_time_and_a_crash_end_the_process_alone(qwen2: World, tmp_path: Path) -> None:
    process = ConversionProcess(str(qwen2.base), Cache(tmp_path), Limits(seconds=2.0))
    raw = qwen2.adapters["lora-1"].raw
    lock = locked(process, qwen2, "lora-1")
    try:
        with pytest.raises(UnsupportedError, match="ended after 2 s"):
            process.obtain(raw)
        assert process.process is None
        killer = threading.Timer(0.5, lambda: os.kill(pid_of(process), signal.SIGKILL))
        process.start()
        killer.start()
        with pytest.raises(AdapterError, match="process that converted it ended") as raised:
            process.obtain(raw)
        assert raised.value.problems[0].got == "signal 9"
        os.close(lock)
        assert process.obtain(raw).seconds is not None
        assert not list(tmp_path.glob(".partial-*"))
    finally:
        process.close()


WAIT = """
import sys
from pathlib import Path
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.processes import ConversionProcess, Limits
process = ConversionProcess(sys.argv[1], Cache(Path(sys.argv[2])), Limits())
process.start()
print(process.process.pid, flush=True)
process.obtain(sys.argv[3])
"""


@pytest.mark.slow
def test_it_ends_with_the_server(qwen2: World, tmp_path: Path) -> None:
    """kill -9 of the server in the middle of a conversion."""
    process = ConversionProcess(str(qwen2.base), Cache(tmp_path), Limits())
    lock = locked(process, qwen2, "lora-1")
    words = [str(qwen2.base), str(tmp_path), str(qwen2.adapters["lora-1"].raw)]
    server = subprocess.Popen([sys.executable, "-c", WAIT, *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server.stdout:
        number = int(server.stdout.readline())
    time.sleep(0.5)
    server.kill()
    server.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{number}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{number}").exists()
    os.close(lock)
