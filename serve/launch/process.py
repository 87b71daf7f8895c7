"""vLLM's server as a child process: converts the adapters first, forwards signals, and reports when it is ready.

After SIGTERM the server has --shutdown-timeout seconds to finish its running requests. A server that has not ended
GRACE seconds later is killed with all of its processes. A server that ends without a signal has failed, whatever its
exit code, since vLLM exits with 0 when its engine has died.
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
from adapter_merge.serve.conversion.served_folder import Served

from .plan import Plan

GRACE = 30  # seconds for the engine to end after the last request


def run(plan: Plan, say: Callable[[str], None]) -> int:
    """Convert the adapters, run the server, and return its exit code. `say` gets one line at a time."""
    started = time.monotonic()
    for note in (*plan.notes, *plan.warnings()):
        say(note)
    leased = convert(plan, say)
    child = subprocess.Popen(
        plan.command(),
        env={**os.environ, **plan.environment()},
        stdout=sys.stderr.fileno(),  # vLLM logs to stdout, which only carries data here
        start_new_session=True,  # Ctrl-C reaches the server once, through `pass_signals`
    )
    passed: list[int] = []
    stop_passing = pass_signals(child, plan.drain_seconds + GRACE, passed)
    try:
        code = _wait(child, plan, say, started)
    finally:
        stop_passing()
        kill_group(child)  # the engine may still run after its server has ended
        for served in leased.values():
            served.release()
    if code == 0 and not passed:
        say("error: the server ended without a signal; its log has the cause")
        return 1
    return code if code >= 0 else 128 - code


def convert(plan: Plan, say: Callable[[str], None]) -> dict[str, Served]:
    """Return the served folders, with leases, of all named adapters and with --preload of the adapter folder.

    Raises AdapterMergeError with all problems of named adapters; problems of others are reported through `say`.
    """
    leased: dict[str, Served] = {}
    problems: list[Problem] = []
    for name, outline in plan.adapters.items():
        try:
            leased[name] = plan.converter.obtain(outline.source, outline.stated)
        except AdapterMergeError as error:
            problems += error.problems
            continue
        plan.ranks[name] = leased[name].rank
        say(describe_adapter(name, outline.method, leased[name]))
    raise_all(problems)
    for name, outline in plan.folder_adapters.items() if plan.preload else ():
        try:
            served = plan.converter.obtain(outline.source, outline.stated)
        except AdapterMergeError as error:
            say(f"{name} cannot be served: {error.problems[0].cause}")
            continue
        if name in leased:
            served.release()
        else:
            leased[name] = served
            say(describe_adapter(name, outline.method, served))
    return leased


def describe_adapter(name: str, method: str, served: Served) -> str:
    """Return one line that describes a converted adapter, with the evidence of its base."""
    scales = " with row scales" if served.form != "lora" else ""
    origin = "from the cache" if served.seconds is None else f"converted in {served.seconds:.1f} s"
    return f"{name}: {method}, rank {served.rank}{scales}, {origin}; base: {served.origin}"


def pass_signals(child: subprocess.Popen[bytes], limit: float, passed: list[int]) -> Callable[[], None]:
    """Forward INT, TERM, HUP and QUIT to the server and kill it `limit` seconds later; return a function to undo it.

    The number of each received signal is appended to `passed`.
    """
    killing = threading.Timer(limit, kill_group, [child])
    killing.daemon = True

    def forward(number: int, frame: object) -> None:
        passed.append(number)
        with suppress(ProcessLookupError):
            child.send_signal(number)
        with suppress(RuntimeError):  # the timer runs since the first signal
            killing.start()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, forward) for number in numbers}

    def undo() -> None:
        killing.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the server's process group."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _wait(child: subprocess.Popen[bytes], plan: Plan, say: Callable[[str], None], started: float) -> int:
    """Poll the server's health until it answers, report that once, then wait for its end."""
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
    """Return True when the server at `url` answers its health check."""
    import ssl

    # The certificate may be for another name than the loopback address; the request goes to the child process only.
    context = ssl._create_unverified_context() if url.startswith("https") else None
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2, context=context) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
