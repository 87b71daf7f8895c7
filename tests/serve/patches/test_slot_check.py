"""The known input at the start and after each load: models that lose the scales are found before they answer."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from server import Server
from world import World

pytestmark = pytest.mark.vllm

START = """
from adapter_merge.serve.patches import row_scale
whole = row_scale.scale_rows
row_scale.scale_rows = {change}
from engine import answer
try:
    answer({{"engine": {engine!r}, "adapters": {{}}, "offline": False, "batches": []}}, "/dev/null")
except RuntimeError as error:
    print("ENDED", error)
"""
CHANGES = {
    "scales lost": "lambda output, bias, scale, slots: output",
    "base scaled": "lambda o, b, scale, slots: whole(o, b, scale, slots.clamp(min=0))",
    "a half of each scale": "lambda o, b, scale, slots: whole(o, b, (scale + 1) / 2, slots)",
    "another slot's": "lambda o, b, scale, slots: whole(o, b, scale.roll(1, 0), slots)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_loses_the_scales_does_not_start(
    qwen2: World, run_python: Callable[[str], str], change: str
) -> None:
    """Before any adapter is there: by scales that are made up."""
    engine = {"model": str(qwen2.base), "max_loras": 2, "max_lora_rank": 16}
    out = run_python(START.format(change=CHANGES[change], engine=engine))
    assert "of this model does not apply row scales" in out.rsplit("ENDED", 1)[1]


# One layer loses its scales after the start.
LATE = """
from adapter_merge.serve.patches import slot_check
whole = slot_check.check_model
def late(manager):
    whole(manager)
    layer = list(manager.modules.values())[{position}]
    layer.apply = layer.unscaled_apply
slot_check.check_model = late
"""
LOAD = """
from engine import answer
batch = [{{"adapter": "lora-1", "prompt": [5, 6, 7], "count": 2}}]
answer({{"engine": {engine!r}, "adapters": {adapters!r}, "offline": False,
        "batches": [[{{"load": "dude-1"}}], [{{"load": "dora-1"}}], batch]}}, {out!r})
"""


@pytest.mark.parametrize("position", [0, 4, -1])
def test_a_layer_that_loses_the_scales_is_found_at_the_load(
    qwen2: World, run_python: Callable[[str], str], tmp_path: Path, position: int
) -> None:
    """The known input through the first, the middle and the last layer: the adapter would be served, and wrong."""
    engine = {"model": str(qwen2.base), "max_loras": 2, "max_lora_rank": 16}
    adapters = {name: str(folder) for name, folder in qwen2.folders("dude-1", "dora-1", "lora-1").items()}
    out = tmp_path / "answers.json"
    run_python(LATE.format(position=position) + LOAD.format(engine=engine, adapters=adapters, out=str(out)))
    dude, dora, plain = json.loads(out.read_text())["answers"]
    for answer in (dude, dora):
        assert isinstance(answer, dict), "loaded"
        assert "does not apply the row scales" in answer["error"]
    assert len(plain[0]["tokens"]) == 2


def test_a_server_whose_model_loses_the_scales_ends(qwen2: World, tmp_path: Path) -> None:
    """The engine in a process of its own: the request that would load the first scaled adapter ends all of it."""
    (tmp_path / "sitecustomize.py").write_text(LATE.format(position=-1))
    directory = tmp_path / "adapters"
    shutil.copytree(qwen2.adapters["dude-1"].raw, directory / "dude-1")
    server = Server(
        tmp_path / "cache",
        tmp_path / "log",
        str(qwen2.base),
        f"lora-1={qwen2.adapters['lora-1'].raw}",
        *("--adapter-dir", str(directory)),
        env={"PYTHONPATH": str(tmp_path)},
    ).wait()
    prompt = [5, 6, 7]
    try:
        assert server.complete("lora-1", prompt, 8) == (200, qwen2.expected("lora-1", prompt, 8)[0])
        assert server.complete("dude-1", prompt, 8)[0] != 200
        code = server.process.wait(timeout=60)
    finally:
        server.stop(signal.SIGKILL)
    assert code == 1
    assert any("does not apply the row scales of the adapter" in line for line in server.lines())
    assert "error: the server ended without a signal" in server.lines()[-1]
