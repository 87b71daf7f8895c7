"""`export --add`: killed before each of its file operations, and eight at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("onnxruntime_genai")

from adapter_merge.cli.main import group
from adapter_merge.errors import MismatchError
from adapter_merge.export.adding import add_adapters
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.exporting import export_model
from adapter_merge.export.folder.contents import read_export
from adapter_merge.outputs.integrity import check_integrity

pytestmark = pytest.mark.onnx
TOKENS = {"prompt": [(37 * i + 11) % 250 for i in range(12)], "rest": [7 * i % 250 for i in range(4)]}

# One process imports everything, then forks once per kill. The child's audit hook counts each operation that changes
# the folder (opening for writing, rename, remove), and kills the child before number STOP; 0 lets it end.
KILLER = """
import json, os, shutil, signal, sys, traceback
from pathlib import Path
import torch, onnxruntime, onnx_ir, transformers, peft
from adapter_merge.export import adding

source, adapter, work, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1"
NAME = "lora" if overwrite else "later"

def changes(event, arguments, folder):
    if event == "open":
        writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return writes and isinstance(arguments[0], str) and arguments[0].startswith(folder)
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"):
        return str(arguments[0]).startswith(folder)
    return False

stop = 0
while True:
    stop += 1
    folder = work / str(stop)
    shutil.copytree(source, folder)
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            global count
            if changes(event, arguments, str(folder)):
                count += 1
                if count == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        code = 1
        try:
            adding.add_adapters(folder, {NAME: adapter}, check=False, overwrite=overwrite)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:  # never through onnxruntime's exit handlers, which wait for a thread that the fork has not
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        print(json.dumps({"kills": stop - 1, "exit": os.WEXITSTATUS(status)}))
        break
"""


def kill_everywhere(source: Path, adapter: Path, work: Path, overwrite: bool) -> int:
    """Return the number of kills; `work`/1, /2, ... hold what each has left, the last one a finished add."""
    work.mkdir()
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        KILLER,
        str(source),
        str(adapter),
        str(work),
        str(int(overwrite)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["exit"] == 0, done.stderr
    return int(report["kills"])


Reference = Callable[[Path, "Path | None", list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def batched(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("batched") / "out"
    export_model(pico, {"lora": adapters["lora"], "dcft": adapters["dcft"]}, output, mode="batched", check=False)
    return output


@pytest.mark.slow(first=False)
@pytest.mark.parametrize(("mode", "overwrite"), [("switchable", False), ("switchable", True), ("batched", False)])
def test_a_kill_at_any_moment_leaves_an_export_that_answers_and_takes_the_next_add(
    mode: str, overwrite: bool, pico: Path, adapters: dict[str, Path], tmp_path: Path, reference: Reference,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    source = Path(shutil.copytree(request.getfixturevalue(mode), tmp_path / "source"))
    kills = kill_everywhere(source, adapters["dude"], tmp_path / "killed", overwrite)
    assert kills >= 8
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    truth = {name: reference(pico, adapters[name], tokens) for name in ("lora", "dcft", "dude", "rslora")}

    def logits(decoder: Decoder, name: str) -> torch.Tensor:
        return torch.from_numpy(run_all(decoder, name, TOKENS)).double()

    def right(decoder: Decoder, name: str, *allowed: str) -> bool:
        got = logits(decoder, name)
        return any(float((got - truth[key]).abs().max()) < 1e-4 for key in allowed)

    before = after = 0
    for stop in range(1, kills + 2):
        folder = tmp_path / "killed" / str(stop)
        decoder = Decoder(folder, threads=1)
        assert right(decoder, "dcft", "dcft")
        assert right(decoder, "lora", "lora", "dude") if overwrite else right(decoder, "lora", "lora")
        if "later" in decoder.adapters:
            assert right(decoder, "later", "dude")
        add_adapters(folder, {"next": adapters["rslora"]}, check=False)
        decoder = Decoder(folder, threads=1)
        assert right(decoder, "next", "rslora")
        assert right(decoder, "dcft", "dcft")
        check_integrity(folder)
        assert read_export(folder).adapters["next"]["source"] == str(adapters["rslora"])
        if overwrite:
            done = read_export(folder).adapters["lora"]["source"] == str(adapters["dude"])
            assert right(decoder, "lora", "dude" if done else "lora")
        else:
            done = "later" in read_export(folder).adapters
            assert ("later" in decoder.adapters) == done
        before, after = before + (not done), after + done
    assert before >= 2
    assert after >= 2


def test_eight_at_a_time_lose_none(switchable: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(switchable, tmp_path / "out"))
    children = []
    for index in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                add_adapters(folder, {f"n{index}": adapters["lora"]}, check=False)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert {f"n{index}" for index in range(8)} <= set(read_export(folder).adapters)
    check_integrity(folder)


@pytest.mark.slow
def test_an_adapter_that_answers_wrongly_is_not_added(
    switchable: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapter_merge.export import adding

    folder = Path(shutil.copytree(switchable, tmp_path / "out"))
    honest = adding.factors_of
    monkeypatch.setattr(adding, "factors_of", lambda base, source, force: honest(base, adapters["lora"], force))
    with pytest.raises(MismatchError, match="does not compute dude"):
        add_adapters(folder, {"dude": adapters["dude"]})
    monkeypatch.undo()
    check_integrity(folder)
    report = add_adapters(folder, {"dude": adapters["dude"]})
    assert report["parity"]["dude"]["max_difference"] < 1e-4 < report["parity"]["dude"]["effect"]
    assert read_export(folder).parity["dude"] == report["parity"]["dude"]


def test_dry_run(switchable: Path, adapters: dict[str, Path]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in switchable.iterdir()}
    arguments = ["export", str(switchable), "--add", f"x={adapters['dude']}", "--dry-run"]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    assert f"would add to {switchable}" in result.stdout
    assert {path.name: path.stat().st_mtime_ns for path in switchable.iterdir()} == before
