"""The running server under load and under faults: every answer its own adapter's, nothing corrupt served, kill -9."""

from __future__ import annotations

import asyncio
import math
import os
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from server import GREEDY, Server, client_of, wait_until
from world import Running, prompts

pytestmark = pytest.mark.vllm

COUNT = 8
# One request per ten tokens or so: 1,000 take about a minute on two cores.
REQUESTS = int(os.environ.get("ADAPTER_MERGE_SERVE_REQUESTS", "1000"))


def test_corrupt_adapters_are_refused_and_the_server_lives(running: Running, tmp_path: Path) -> None:
    raw = running.world.adapters["dude-2"].raw

    def spoiled(how: str) -> Path:
        folder = tmp_path / how
        shutil.copytree(raw, folder)
        weights = folder / "adapter_model.safetensors"
        if how == "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif how == "lying":
            data = bytearray(weights.read_bytes())
            data[:8] = (2**62).to_bytes(8, "little")
            weights.write_bytes(bytes(data))
        elif how == "config":
            (folder / "adapter_config.json").write_text('{"peft_type": "DUDE"')
        else:
            tensors = load_file(weights)
            key = next(iter(tensors))
            if how == "nan":
                tensors[key].view(-1)[0] = float("nan")
            elif how == "lost":
                tensors.pop(key)
            elif how == "stranger":
                tensors[key.replace("layers.", "layers.7")] = tensors[key].clone()
            save_file(tensors, weights)
        return folder

    for how in ("cut", "lying", "config", "nan", "lost", "stranger"):
        status, body = running.server.post("load_lora_adapter", lora_name=how, lora_path=str(spoiled(how)))
        assert status == 400, f"{how}: {status} {body}"
    status, body = running.server.post("load_lora_adapter", lora_name="none", lora_path=str(tmp_path / "none"))
    assert status == 400
    assert "no such adapter" in body
    prompt = [5, 6, 7]
    assert running.server.complete("dude-1", prompt, COUNT) == (200, running.tokens("dude-1", prompt))


def test_mixed_load_while_adapters_come_and_go(running: Running, record_property: Any) -> None:
    """Many concurrent requests; every single answer is that of its own adapter.

    Meanwhile adapters are loaded under new names, used, replaced in place and unloaded, with fewer slots than
    adapters, so that slots change hands all the time.
    """
    world = running.world
    several = prompts(6, 10, seed=11)
    expected = {
        (name, number): running.tokens(name, prompt)
        for name in (None, *world.adapters)
        for number, prompt in enumerate(several)
    }
    chooser = random.Random(0)
    stable = [None, "lora-1", "dcft-1", "dude-1", "dora-2", "lora-2", "dude-2"]
    wrong: list[str] = []
    done = 0

    async def ask(client: Any, model: str, adapter: str | None, number: int) -> None:
        nonlocal done
        answer = await client.completions.create(
            model=model, prompt=several[number], max_tokens=COUNT, extra_body=GREEDY
        )
        done += 1
        if answer.choices[0].token_ids != expected[adapter, number]:
            wrong.append(f"{model}, prompt {number}: {answer.choices[0].token_ids}")

    async def traffic(client: Any, count: int) -> None:
        for _ in range(count):
            adapter = chooser.choice(stable)
            await ask(client, adapter or "base", adapter, chooser.randrange(6))

    async def churn(client: Any, stop: asyncio.Event) -> int:
        rounds = 0
        while not stop.is_set():
            first, second = chooser.sample(["dora-1", "dcft-2", "dude-1", "lora-1"], 2)
            name = f"temporary-{rounds}"
            for inplace, adapter in ((False, first), (True, second)):
                status, body = await asyncio.to_thread(
                    running.server.post,
                    "load_lora_adapter",
                    lora_name=name,
                    lora_path=str(world.adapters[adapter].raw),
                    load_inplace=inplace,
                )
                assert status == 200, body
                await asyncio.gather(*(ask(client, name, adapter, number) for number in range(3)))
            assert (await asyncio.to_thread(running.server.post, "unload_lora_adapter", lora_name=name))[0] == 200
            rounds += 1
        return rounds

    async def everything() -> int:
        async with client_of(running.server, "AsyncOpenAI") as client:
            stop = asyncio.Event()
            coming = asyncio.create_task(churn(client, stop))
            await asyncio.gather(*(traffic(client, REQUESTS // 12) for _ in range(12)))
            stop.set()
            return await coming

    began = time.monotonic()
    rounds = asyncio.run(everything())
    assert wrong == []
    assert rounds > 0
    assert done >= REQUESTS // 12 * 12
    record_property("requests", done)
    print(f"{done} requests, {rounds} adapters loaded, replaced, unloaded, {time.monotonic() - began:.0f} s")


def processes_with(text: str) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if text in line and "ps -eo" not in line]


def test_killed_and_started_again(running: Running, tmp_path: Path) -> None:
    """The last test: kill -9 of the command takes the server with it; the next start finds every adapter converted.

    SIGTERM then lets requests under way finish, takes no new ones, and leaves no process.
    """
    server, prompt = running.server, [5, 6, 7]
    assert any("dude-1: DuDe" in line and "converted in" in line for line in server.lines())
    server.stop(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while processes_with(f"--port {server.port}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(f"--port {server.port}") == []
    named = [f"{name}={running.world.adapters[name].raw}" for name in ("dude-1", "lora-1")]
    drain = ("--shutdown-timeout", "120")  # a busy machine may need more than the 30 s of the default
    again = Server(running.cache, tmp_path / "second", str(running.world.base), *named, *drain).wait()
    try:
        assert any("dude-1: DuDe" in line and "from the cache" in line for line in again.lines())
        assert any("bound to 127.0.0.1: this machine only" in line for line in again.lines())
        assert again.complete("dude-1", prompt, COUNT) == (200, running.tokens("dude-1", prompt))
        pair = ("dude-1", "lora-1")
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            with ThreadPoolExecutor(8) as pool:
                assert {code for code, _ in pool.map(lambda name: again.complete(name, prompt, 300), pair * 4)} == {200}
            seconds.append(time.monotonic() - started)
        rounds = min(24, math.ceil(6 / min(seconds)))  # enough to be under way for some seconds
        with ThreadPoolExecutor(8 * rounds) as pool:
            long = [pool.submit(again.complete, name, prompt, 300) for name in pair * 4 * rounds]
            states = "running", "waiting"  # all are there, or answered: one that comes later is refused
            wait_until(lambda: again.count_requests(*states) + sum(future.done() for future in long) >= len(long))
            os.kill(again.process.pid, signal.SIGTERM)
            time.sleep(0.5)
            assert not all(future.done() for future in long), "too short to be under way still"
            late = again.complete("dude-1", prompt, COUNT)
            for future, name in zip(long, pair * 4 * rounds, strict=True):
                assert future.result() == (200, running.world.expected(name, prompt, 300)[0])
        assert late[0] == 503, late
        code = again.process.wait(timeout=60)
    finally:
        again.stop(signal.SIGKILL)
    assert code == 0, again.lines()[-5:]
    assert processes_with(f"--port {again.port}") == []
    with pytest.raises(ProcessLookupError):
        os.killpg(
            int(next(line for line in again.lines() if "APIServer pid=" in line).split("pid=")[1].split(")")[0]), 0
        )
    assert again.stdout.read_text() == ""  # stdout is for data
