"""vLLM's server as a child process: adapters converted before it, signals handed on, a line when it is ready.

After SIGTERM the server finishes the requests that it has, for --shutdown-timeout seconds. One that has not gone GRACE
seconds later is killed with all of its processes. A server that ends without a signal has failed, whatever its exit
code: vLLM's is 0 when its engine has died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from adapter_merge.errors import AdapterMergeError, Problem, raise_all
from adapter_merge.serve.conversion.served import Served

from .plan import Plan

GRACE = 30  # seconds for the engine's own end after the last request


def run(plan: Plan, say: Callable[[str], None]) -> int:
    """Convert, start the server, wait for its end: the server's exit code. `say` gets one line at a time."""
    started = time.monotonic()
    for note in (*plan.notes, *plan.warnings()):
        say(note)
    held = convert(plan, say)
    child = subprocess.Popen(
        plan.command(),
        env={**os.environ, **plan.environment()},
        stdout=sys.stderr.fileno(),  # vLLM logs to stdout; ours holds data only
        start_new_session=True,  # Ctrl-C reaches the server through us, once
    )
    passed: list[int] = []
    stop_passing = pass_signals(child, plan.drain_seconds + GRACE, passed)
    try:
        code = _wait(child, plan, say, started)
    finally:
        stop_passing()
        kill_group(child)  # an engine that has outlived its server
        for served in held.values():
            served.release()
    if code == 0 and not passed:
        say("error: the server ended by itself; its log has the cause")
        return 1
    return code if code >= 0 else 128 - code


def convert(plan: Plan, say: Callable[[str], None]) -> dict[str, Served]:
    """Every named adapter as a served folder, held until its release, and with --preload those of the adapter folder.

    Raises AdapterMergeError with all problems of named adapters; what is wrong with another one is said.
    """
    held: dict[str, Served] = {}
    problems: list[Problem] = []
    for name, outline in plan.adapters.items():
        try:
            held[name] = plan.converter.obtain(outline.source, outline.stated)
        except AdapterMergeError as error:
            problems += error.problems
            continue
        plan.ranks[name] = held[name].rank
        say(described(name, outline.method, held[name]))
    raise_all(problems)
    for name, outline in plan.found.items() if plan.preload else ():
        try:
            served = plan.converter.obtain(outline.source, outline.stated)
        except AdapterMergeError as error:
            say(f"{name} cannot be served: {error.problems[0].cause}")
            continue
        if name in held:
            served.release()
        else:
            held[name] = served
            say(described(name, outline.method, served))
    return held


def described(name: str, method: str, served: Served) -> str:
    """One line on a converted adapter, with the evidence of its base."""
    scales = " with row scales" if served.form != "lora" else ""
    how = "from the cache" if served.seconds is None else f"converted in {served.seconds:.1f} s"
    return f"{name}: {method}, rank {served.rank}{scales}, {how}; base: {served.origin}"


def pass_signals(child: subprocess.Popen[bytes], limit: float, passed: list[int]) -> Callable[[], None]:
    """Hand INT, TERM, HUP and QUIT to the server, and kill it `limit` seconds later; returns what undoes it.

    `passed` gets the number of each signal that came.
    """
    killing = threading.Timer(limit, kill_group, [child])
    killing.daemon = True

    def forward(number: int, frame: object) -> None:
        passed.append(number)
        with suppress(ProcessLookupError):
            child.send_signal(number)
        with suppress(RuntimeError):  # the second signal: the time runs already
            killing.start()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, forward) for number in numbers}

    def undo() -> None:
        killing.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill every process of the server, which leads a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _wait(child: subprocess.Popen[bytes], plan: Plan, say: Callable[[str], None], started: float) -> int:
    """Poll the server's health until it answers, say so once, then wait for its end."""
    url = plan.address()
    while url is not None:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.5)
        if healthy(url):
            names = ", ".join([plan.served_name, *plan.adapters])
            more = f", and any of {plan.adapter_dir} by name" if plan.adapter_dir is not None else ""
            page = f"; a page to try them: {url}/page" if plan.page else ""
            say(f"ready after {time.monotonic() - started:.0f} s at {url}/v1 ({plan.bound()}) with {names}{more}{page}")
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
