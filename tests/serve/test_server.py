"""The real command, the real OpenAI server and a real client over the loopback interface.

Adapters arrive as their training saved them (DCFT, DuDe, PEFT DoRA and LoRA folders); every answer is compared with
the merged Hugging Face model's.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import World, prompts
from safetensors.torch import load_file, save_file
from server import GREEDY, KEY, Server

pytestmark = pytest.mark.vllm

COUNT = 8
# One request per ten tokens or so: 1,000 take about a minute on two cores.
REQUESTS = int(os.environ.get("ADAPTER_MERGE_SERVE_REQUESTS", "1000"))


@dataclass
class Running:
    world: World
    server: Server
    directory: Path
    cache: Path

    def tokens(self, adapter: str | None, prompt: list[int]) -> list[int]:
        return self.world.expected(adapter, prompt, COUNT)[0]


@pytest.fixture(scope="module")
def running(qwen2: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Three adapters named at start; the others in a folder, loaded when somebody asks for them."""
    folder = tmp_path_factory.mktemp("server")
    directory = folder / "adapters"
    directory.mkdir()
    for name in ("dora-2", "lora-2", "dude-2"):
        shutil.copytree(qwen2.adapters[name].raw, directory / name)
    named = [f"{name}={qwen2.adapters[name].raw}" for name in ("lora-1", "dcft-1", "dude-1")]
    server = Server(
        folder / "cache",
        folder / "log",
        str(qwen2.base),
        *named,
        "--adapter-dir",
        str(directory),
        "--max-active",
        "3",
        vllm=("--served-model-name", "base"),
    )
    try:
        yield Running(qwen2, server.wait(), directory, folder / "cache")
    finally:
        server.stop(signal.SIGKILL)


def client_of(server: Server, kind: str = "OpenAI") -> Any:
    import openai  # vLLM depends on it

    return getattr(openai, kind)(base_url=server.url, api_key=KEY, max_retries=0, timeout=120)


def test_chat_with_three_adapters_and_the_base(running: Running) -> None:
    with client_of(running.server) as client:
        assert [model.id for model in client.models.list()] == ["base", "lora-1", "dcft-1", "dude-1"]
        for name in ("lora-1", "dcft-1", "dude-1", "base"):
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "What is a low-rank adapter?"}],
                max_tokens=COUNT,
                temperature=0,
                extra_body=GREEDY,
            )
            prompt = answer.prompt_token_ids
            assert len(prompt) > 20
            assert answer.choices[0].token_ids == running.tokens(None if name == "base" else name, prompt)


def test_a_name_of_the_folder_is_loaded_on_the_first_request(running: Running) -> None:
    (prompt,) = prompts(1, 14, seed=5)
    for name in ("dora-2", "dude-2"):
        assert running.server.complete(name, prompt, COUNT) == (200, running.tokens(name, prompt))
    with client_of(running.server) as client:
        assert {"dora-2", "dude-2"} <= {model.id for model in client.models.list()}


def test_load_and_unload_a_raw_folder(running: Running) -> None:
    (prompt,) = prompts(1, 14, seed=6)
    raw = running.world.adapters["dora-1"].raw
    assert running.server.complete("extra", prompt, COUNT)[0] == 404
    assert running.server.post("load_lora_adapter", lora_name="extra", lora_path=str(raw))[0] == 200
    assert running.server.complete("extra", prompt, COUNT) == (200, running.tokens("dora-1", prompt))
    # Another adapter under the same name: nothing of the old one may answer, from the prefix cache either.
    other = running.world.adapters["dcft-2"].raw
    assert running.server.post("load_lora_adapter", lora_name="extra", lora_path=str(other))[0] == 400
    status, _ = running.server.post("load_lora_adapter", lora_name="extra", lora_path=str(other), load_inplace=True)
    assert status == 200
    assert running.server.complete("extra", prompt, COUNT) == (200, running.tokens("dcft-2", prompt))
    assert running.server.post("unload_lora_adapter", lora_name="extra")[0] == 200
    assert running.server.complete("extra", prompt, COUNT)[0] == 404


def test_what_a_folder_states_is_read(running: Running) -> None:
    """A DCFT that lost its alpha: refused, then served as read_options.json says, and again as it says later."""
    (prompt,) = prompts(1, 14, seed=9)
    folder = running.directory / "stated"
    shutil.copytree(running.world.adapters["dcft-1"].raw, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("lora_alpha")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    status, body = running.server.complete("stated", prompt, COUNT)
    assert status == 400
    assert "lora_alpha" in str(body)
    (folder / "read_options.json").write_text(json.dumps({"alpha": 32}))
    assert running.server.complete("stated", prompt, COUNT) == (200, running.tokens("dcft-1", prompt))
    (folder / "read_options.json").write_text(json.dumps({"alpha": 0.001}))
    assert running.server.complete("stated", prompt, COUNT) == (200, running.tokens(None, prompt))
    (folder / "read_options.json").write_text(json.dumps({"alpha": "none"}))
    assert running.server.complete("stated", prompt, COUNT)[0] == 400
    shutil.rmtree(folder)


def test_a_replaced_folder_is_never_served_stale(running: Running) -> None:
    (prompt,) = prompts(1, 150, seed=7)
    folder = running.directory / "moving"
    for name in ("lora-2", "dude-1", "dora-1", "lora-2"):
        new = running.directory / ".new"
        shutil.copytree(running.world.adapters[name].raw, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        assert running.server.complete("moving", prompt, COUNT) == (200, running.tokens(name, prompt)), name
    # In place, file by file: the config of one and the weights of another never make an adapter.
    raw = running.world.adapters["dude-1"].raw
    shutil.copyfile(raw / "adapter_config.json", folder / "adapter_config.json")
    assert running.server.complete("moving", prompt, COUNT)[0] == 400
    shutil.copyfile(raw / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    assert running.server.complete("moving", prompt, COUNT) == (200, running.tokens("dude-1", prompt))
    shutil.rmtree(folder)
    assert running.server.complete("moving", prompt, COUNT)[0] == 404


def test_requests_under_way_keep_the_adapter_they_began_with(running: Running) -> None:
    """Replaced in the middle of long answers: these end as they began, the next ones are the new adapter's."""
    several = prompts(4, 20, seed=9)
    folder = running.directory / "live"
    shutil.copytree(running.world.adapters["dude-1"].raw, folder)
    assert running.server.complete("live", several[0], 1)[0] == 200
    with ThreadPoolExecutor(8) as pool:
        long = [pool.submit(running.server.complete, "live", prompt, 200) for prompt in several[:2]]
        time.sleep(0.5)
        new = running.directory / ".new"
        shutil.copytree(running.world.adapters["dora-1"].raw, new)
        folder.rename(running.directory / ".old")
        new.rename(folder)
        short = [pool.submit(running.server.complete, "live", prompt, 40) for prompt in several]
        others = [pool.submit(running.server.complete, name, several[0], 40) for name in ("lora-1", "base")]
        for future, prompt in zip(long, several, strict=False):
            assert future.result() == (200, running.world.expected("dude-1", prompt, 200)[0])
        for future, prompt in zip(short, several, strict=True):
            assert future.result() == (200, running.world.expected("dora-1", prompt, 40)[0])
        for future, name in zip(others, ("lora-1", None), strict=True):
            assert future.result() == (200, running.world.expected(name, several[0], 40)[0])
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", ".hidden", "a\\b", "lora-2/", "/etc", "a\0b"])
def test_names_that_could_leave_the_folder_are_refused(running: Running, name: str) -> None:
    shutil.copytree(running.world.adapters["lora-2"].raw, running.directory.parent / "secret", dirs_exist_ok=True)
    assert running.server.complete(name, [5, 6], COUNT)[0] in (400, 404)
    raw = str(running.world.adapters["lora-2"].raw)
    assert running.server.post("load_lora_adapter", lora_name=name, lora_path=raw)[0] == 400


def test_links_that_leave_the_folder_are_refused(running: Running, tmp_path: Path) -> None:
    raw = running.world.adapters["lora-2"].raw
    whole = running.directory / "linked"
    whole.symlink_to(raw)
    assert running.server.complete("linked", [5, 6], COUNT)[0] == 400
    part = running.directory / "part"
    part.mkdir()
    shutil.copyfile(raw / "adapter_config.json", part / "adapter_config.json")
    (part / "adapter_model.safetensors").symlink_to(raw / "adapter_model.safetensors")
    status, body = running.server.complete("part", [5, 6], COUNT)
    assert status == 400
    assert "leaves the adapter folder" in body
    within = running.directory / "within"
    within.symlink_to(running.directory / "lora-2")
    prompt = [7, 8, 9]
    assert running.server.complete("within", prompt, COUNT) == (200, running.tokens("lora-2", prompt))


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
    assert "no such folder" in body
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
    """The last test: kill -9 of the command takes the server with it; the next start finds every adapter converted."""
    server, prompt = running.server, [5, 6, 7]
    assert any("dude-1: DuDe" in line and "converted in" in line for line in server.lines())
    server.stop(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while processes_with(f"--port {server.port}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(f"--port {server.port}") == []
    named = [f"{name}={running.world.adapters[name].raw}" for name in ("dude-1", "lora-1")]
    again = Server(running.cache, tmp_path / "second", str(running.world.base), *named).wait()
    try:
        assert any("dude-1: DuDe" in line and "from the cache" in line for line in again.lines())
        assert again.complete("dude-1", prompt, COUNT) == (200, running.tokens("dude-1", prompt))
    finally:
        code = again.stop(signal.SIGINT)
    assert code == 0, again.lines()[-5:]
    assert again.stdout.read_text() == ""  # stdout is for data
