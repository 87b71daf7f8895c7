"""Checked load on `adapter-merge serve`: every answer is compared with the merged weights' in transformers, float64.

    python benchmarks/serve_load.py mixed [--requests 20000] [--minutes 30] [--clients 16] [--json]
    python benchmarks/serve_load.py loads [--loads 1000]
    python benchmarks/serve_load.py kills [--rounds 20]

mixed    requests to the base and many adapters on fewer slots, completions and chats, streamed or not, while adapters
         are replaced and removed in the adapter folder, and loaded, replaced and unloaded by request. --minutes goes on
         for that long whatever the count.
loads    adapters loaded and unloaded, with memory and descriptors of all the server's processes before and after.
kills    two servers on one cache; in each round one of them, its API server, all its processes or its conversions get
         kill -9 while both convert the same new adapters.

A tiny Qwen2 and adapters of four kinds, tests/serve/trained.py; vLLM, CPU or CUDA, must be installed. Exit code 1 when
anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serve"))

import psutil
import torch
from oracle import Oracle
from server import KEY, Server
from trained import MAKERS, Adapter, base_weights, make_base

from adapter_merge.serve.conversion.cache import Cache

COUNT = 4  # tokens of an answer
PER_KIND = 6
STABLE = 6  # adapters that no one changes, of the adapters that are there
MOVING = ("moving-0", "moving-1", "moving-2")
NO_ADAPTER = "base"


@dataclass
class Question:
    """One prompt, as token ids or as a chat, and what each adapter answers."""

    path: str
    content: dict[str, Any]
    answers: dict[str, list[int]]


@dataclass
class World:
    """A base, adapters by name, and questions with their answers."""

    folder: Path
    base: Path
    adapters: dict[str, Adapter]
    questions: list[Question]

    @classmethod
    def make(cls, folder: Path, prompts: int = 8, chats: int = 4) -> World:
        import transformers

        base = make_base(folder / "model", "qwen2")
        weights = base_weights(base)
        oracle = Oracle(base, weights)
        generator = torch.Generator().manual_seed(7)
        adapters = {}
        for number in range(PER_KIND):
            for kind, make in MAKERS.items():
                name = f"{kind}-{number}"
                adapters[name] = make(name, folder / "made" / name, weights, generator)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        questions = []
        for number in range(prompts + chats):
            if number < prompts:
                tokens = torch.randint(0, 512, (10,), generator=generator).tolist()
                path, content = "completions", {"prompt": tokens}
            else:
                text = f"question {number}"
                tokens = tokenizer(f"user: {text}", add_special_tokens=False)["input_ids"]
                path, content = "chat/completions", {"messages": [{"role": "user", "content": text}]}
            merged = {NO_ADAPTER: {}, **{name: adapter.merged for name, adapter in adapters.items()}}
            answers = {name: oracle.greedy(changed, tokens, COUNT)[0] for name, changed in merged.items()}
            questions.append(Question(path, content, answers))
        return cls(folder, base, adapters, questions)

    def serve(self, log: str, *arguments: str, cache: str = "cache") -> Server:
        return Server(
            self.folder / cache, self.folder / log, str(self.base), *arguments, vllm=("--served-model-name", NO_ADAPTER)
        )

    def right(self, server: Server, name: str, adapter: str, question: Question) -> str:
        """ "" for the right answer, else what came."""
        greedy = {"max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        try:
            status, body = server.post(question.path, model=name, **question.content, **greedy)
            got = json.loads(body)["choices"][0]["token_ids"] if status == 200 else f"{status} {body[:300]}"
        except (OSError, ValueError) as error:
            got = repr(error)
        return "" if got == question.answers[adapter] else f"{name}: {got}"


@dataclass
class Place:
    """A name in the adapter folder: what it held when, to know which answers a request may get."""

    changes: list[tuple[float, float, str | None]] = field(default_factory=list)  # begin, end, what it holds then

    def allowed(self, began: float, ended: float) -> set[str | None]:
        """What the name may have been in this time; None where it may have been missing."""
        found: set[str | None] = set()
        for start, end, adapter in self.changes:
            if end <= began:
                found = {adapter}
            elif start < ended:
                found |= {adapter, None}
        return found


def processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def usage(server: Server) -> dict[str, float]:
    """MB and descriptors of the server's processes; conversions apart, whose number is bounded."""
    held, bytes_, conversions = 0, 0, 0
    for process in processes(server):
        with suppress(psutil.Error):
            if "adapter_merge.serve.conversion.worker" in process.cmdline():
                conversions += process.memory_info().rss
            else:
                bytes_ += process.memory_info().rss
                held += process.num_fds()
    return {"MB": round(bytes_ / 1e6), "descriptors": held, "MB of conversions": round(conversions / 1e6)}


class Mixed:
    """The mixed load on one server."""

    def __init__(self, world: World, options: argparse.Namespace) -> None:
        self.world, self.options = world, options
        self.chooser = random.Random(0)
        self.directory = world.folder / "adapters"
        names = list(world.adapters)
        self.stable, self.pool = names[:STABLE], names[STABLE:]
        self.places = {name: Place() for name in MOVING}
        for name in self.stable[3:]:
            shutil.copytree(world.adapters[name].raw, self.directory / name)
        for name in MOVING:
            self.put(name, self.chooser.choice(self.pool))
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.next = 0
        self.longest = 0.0  # seconds of a load

    def put(self, name: str, adapter: str | None) -> None:
        """Replace or remove what a name of the folder holds."""
        began = time.monotonic()
        place, new, old = self.directory / name, self.directory / f".new-{name}", self.directory / f".old-{name}"
        if adapter is not None:
            shutil.copytree(self.world.adapters[adapter].raw, new)
            began = time.monotonic()
        if place.exists():
            place.rename(old)
        if adapter is not None:
            new.rename(place)
        self.places[name].changes.append((began, time.monotonic(), adapter))
        shutil.rmtree(old, ignore_errors=True)

    async def ask(self, name: str, question: Question, stream: bool) -> list[int] | str:
        greedy = {"max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        content = {"model": name, "stream": stream, **question.content, **greedy}
        if not stream:
            answer = await self.client.post(question.path, json=content)
            if answer.status_code != 200:
                return f"{answer.status_code} {answer.text[:300]}"
            return answer.json()["choices"][0]["token_ids"]
        tokens: list[int] = []
        async with self.client.stream("POST", question.path, json=content) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {(await answer.aread()).decode()[:300]}"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    found = json.loads(line.removeprefix("data: "))
                    if "choices" not in found:
                        return f"in a stream: {line[:300]}"
                    for choice in found["choices"]:
                        tokens += choice.get("token_ids") or []
        return tokens

    async def check(self, name: str, adapters: set[str | None] | None = None) -> None:
        """One request; with no `adapters`, the name's history says which may answer."""
        question, stream = self.chooser.choice(self.world.questions), self.chooser.random() < 0.4
        began = time.monotonic()
        try:
            got = await self.ask(name, question, stream)
        except Exception as error:
            got = repr(error)
        allowed = adapters if adapters is not None else self.places[name].allowed(began, time.monotonic())
        kind = f"{'chat' if question.path.startswith('chat') else 'completion'}{', streamed' if stream else ''}"
        if isinstance(got, str) and None in allowed and got[:4] in ("404 ", "400 "):
            kind = "refused, the name being away"
        elif not any(got == question.answers[adapter] for adapter in allowed if adapter is not None):
            self.wrong.append(f"{name} as {sorted(map(str, allowed))}, {kind}: {got}")
        self.counts[kind] += 1

    async def traffic(self, end: float) -> None:
        while self.next < self.options.requests or time.monotonic() < end:
            self.next += 1
            if self.next % 1000 == 0:
                print(f"{self.next} requests, {len(self.wrong)} wrong", file=sys.stderr, flush=True)
            name = self.chooser.choice([NO_ADAPTER, *self.stable, *MOVING])
            await self.check(name, None if name in MOVING else {name})

    async def replace(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            name = self.chooser.choice(MOVING)
            gone = self.chooser.random() < 0.2
            await asyncio.to_thread(self.put, name, None if gone else self.chooser.choice(self.pool))
            self.counts["removed in the folder" if gone else "replaced in the folder"] += 1
            await asyncio.sleep(self.chooser.random() * 1.5)

    async def post(self, path: str, content: dict[str, Any]) -> str | None:
        """Return what is wrong with the answer to a request that loads or unloads, or None."""
        import httpx

        try:
            answer = await self.client.post(path, json=content)
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}"
        return None if answer.status_code == 200 else f"{answer.status_code} {answer.text[:300]}"

    async def load(self, stop: asyncio.Event) -> None:
        """Load a name, replace it in place, unload it; each answers as it must, and is unknown at the end."""
        number = 0
        while not stop.is_set():
            name, number = f"loaded-{number}", number + 1
            for inplace, adapter in enumerate(self.chooser.sample(self.pool, 2)):
                path = str(self.world.adapters[adapter].raw)
                content = {"lora_name": name, "lora_path": path, "load_inplace": bool(inplace)}
                began = time.monotonic()
                problem = await self.post("load_lora_adapter", content)
                self.longest = max(self.longest, time.monotonic() - began)
                if problem:
                    self.wrong.append(f"load of {name}: {problem}")
                self.counts["replaced by request" if inplace else "loaded by request"] += 1
                await asyncio.gather(*(self.check(name, {adapter}) for _ in range(3)))
            problem = await self.post("unload_lora_adapter", {"lora_name": name})
            if problem:
                self.wrong.append(f"unload of {name}: {problem}")
            await self.check(name, {None})
            await asyncio.sleep(0.5)

    async def run(self, server: Server) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(keepalive_expiry=2)  # the server ends idle connections after 5 s
        async with httpx.AsyncClient(
            base_url=server.url + "/", headers=headers, timeout=300, limits=limits
        ) as self.client:
            stop = asyncio.Event()
            churn = [asyncio.create_task(self.replace(stop)), asyncio.create_task(self.load(stop))]
            end = time.monotonic() + 60 * self.options.minutes
            await asyncio.gather(*(self.traffic(end) for _ in range(self.options.clients)))
            stop.set()
            await asyncio.gather(*churn)


def mixed(world: World, options: argparse.Namespace) -> dict[str, Any]:
    load = Mixed(world, options)
    named = [f"{name}={world.adapters[name].raw}" for name in load.stable[:3]]
    folders = ["--adapter-dir", str(load.directory), "--allow-loading", "--adapter-root", str(world.folder / "made")]
    server = world.serve("log", *named, *folders, "--max-active", "3").wait()
    try:
        before, began = usage(server), time.monotonic()
        asyncio.run(load.run(server))
        seconds, after = time.monotonic() - began, usage(server)
    finally:
        server.stop(signal.SIGTERM)
    checked = sum(number for kind, number in load.counts.items() if kind.startswith(("chat", "completion", "refused")))
    found = {"checked": checked, "wrong": len(load.wrong), "seconds": round(seconds), "counts": dict(load.counts)}
    return {
        **found,
        "longest load": round(load.longest, 1),
        "before": before,
        "after": after,
        "examples": load.wrong[:10],
    }


def loads(world: World, options: argparse.Namespace) -> dict[str, Any]:
    names = list(world.adapters)
    server = world.serve("log", "--allow-loading", "--adapter-root", str(world.folder), "--max-active", "3").wait()
    wrong: list[str] = []

    def cycle(number: int) -> None:
        name, adapter = f"load-{number}", names[number % len(names)]
        for path, content in (
            ("load_lora_adapter", {"lora_name": name, "lora_path": str(world.adapters[adapter].raw)}),
            ("unload_lora_adapter", {"lora_name": name}),
        ):
            status, body = server.post(path, **content)
            if status != 200:
                wrong.append(f"{path} {name}: {status} {body[:300]}")
            elif path.startswith("load"):
                wrong.extend(filter(None, [world.right(server, name, adapter, world.questions[number % 12])]))

    try:
        for number in range(60):  # caches of the process fill, every slot is used, every adapter is converted
            cycle(number)
        marks = [usage(server)]
        for part in range(4):
            for number in range(options.loads // 4):
                cycle(60 + part * (options.loads // 4) + number)
            marks.append(usage(server))
    finally:
        server.stop(signal.SIGTERM)
    return {"loads": options.loads // 4 * 4, "wrong": len(wrong), "quarters": marks, "examples": wrong[:10]}


KILLS = ("the command", "its API server", "all its processes", "its conversions")


def kill(server: Server, how: str) -> None:
    """kill -9."""
    everyone = processes(server)
    api = everyone[1:2]
    conversions = [process for process in everyone if "adapter_merge.serve.conversion.worker" in process.cmdline()]
    chosen = {KILLS[0]: everyone[:1], KILLS[1]: api, KILLS[2]: everyone, KILLS[3]: conversions}[how]
    for process in chosen:
        with suppress(psutil.Error):
            process.kill()


def kills(world: World, options: argparse.Namespace) -> dict[str, Any]:
    directory = world.folder / "adapters"
    directory.mkdir()
    started = 0

    def start() -> Server:
        nonlocal started
        started += 1
        return world.serve(f"log-{started}", "--adapter-dir", str(directory), "--max-active", "3")

    servers = [start(), start()]
    gone: list[psutil.Process] = []
    names, chooser, wrong = list(world.adapters), random.Random(0), []
    cache = Cache(world.folder / "cache")
    fresh: dict[str, str] = {}
    counts: Counter[str] = Counter()
    partial = 0
    try:
        for server in servers:
            server.wait()
        for number in range(options.rounds):
            place = (number + number // 4) % 2  # each kind hits both
            victim, other, how = servers[place], servers[1 - place], KILLS[number % 4]
            for kind in chooser.sample(names, 3):  # the same values in a file with other bytes
                name = f"new-{number}-{kind}"
                folder = shutil.copytree(world.adapters[kind].raw, directory / f".{name}")
                config = json.loads((folder / "adapter_config.json").read_text())
                (folder / "adapter_config.json").write_text(json.dumps(config, indent=1 + number))
                folder.rename(directory / name)
                fresh[name] = kind
            asked = [(name, kind) for name, kind in fresh.items() if name.startswith(f"new-{number}-")]
            everyone = processes(victim)
            with ThreadPoolExecutor(8) as pool:
                both = [
                    (server, pool.submit(world.right, server, name, kind, chooser.choice(world.questions)))
                    for name, kind in asked
                    for server in (victim, other)
                ]
                time.sleep(chooser.random() * 1.5)
                partial += len(list(cache.root.glob(".partial-*")))
                kill(victim, how)
                for server, future in both:
                    problem = future.result()
                    if server is other and problem:
                        wrong.append(f"round {number}, {how}, the other server: {problem}")
                    elif problem and ": [" in problem:
                        wrong.append(f"round {number}, {how}, the killed server: {problem}")
            if how == KILLS[3]:
                wrong += [f"round {number}: after its conversions' end: {problem}" for name, kind in asked
                          if (problem := world.right(victim, name, kind, world.questions[0]))]  # fmt: skip
            else:
                gone += everyone
                servers[place] = start().wait()
            wrong += [f"round {number}: {entry.folder.name}: {problems}" for entry, problems in cache.verify()]
            counts[how] += 1
            print(f"round {number}, {how}: {len(wrong)} wrong", file=sys.stderr, flush=True)
        for server in servers:
            for name, kind in fresh.items():
                wrong += filter(None, [world.right(server, name, kind, world.questions[1])])
        time.sleep(1)
        litter = sorted(path.name for path in cache.root.glob(".partial-*"))
        locks = {path.stem for path in cache.root.glob("*.lock")} - {entry.key for entry in cache.entries()}
        psutil.wait_procs(gone, timeout=90)
        left = [process.pid for process in gone if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    finally:
        for server in servers:
            server.stop(signal.SIGTERM)
    wrong += [f"litter: {name}" for name in litter] + [f"a process is left: {number}" for number in left]
    found = {"rounds": dict(counts), "starts": started, "converted": len(fresh), "half-made at a kill": partial}
    return {**found, "locks without an entry": len(locks), "wrong": len(wrong), "examples": wrong[:10]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["mixed", "loads", "kills"])
    for name, default in (("requests", 20_000), ("minutes", 0), ("clients", 16), ("loads", 1000), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        world = World.make(Path(temporary))
        found = {"mixed": mixed, "loads": loads, "kills": kills}[options.part](world, options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
