"""A running `adapter-merge serve` on a port of the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import vllm_environment

KEY = "a-secret"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], limit: float = 60) -> None:
    """Ask every 20 ms until `condition` is true. Raises AssertionError after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit} s"
        time.sleep(0.02)


class Server:
    """`adapter-merge serve`, started in a process and waited for."""

    def __init__(
        self,
        cache: Path,
        log: Path,
        *arguments: str,
        vllm: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.started = time.monotonic()
        self.stdout = log.with_suffix(".stdout")
        with log.open("w") as stream, self.stdout.open("w") as stdout:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from adapter_merge.cli.main import main; main()",
                    "serve",
                    *arguments,
                    "--",
                    *("--port", str(self.port), "--host", "127.0.0.1", "--api-key", KEY),
                    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512"),
                    *("--max-num-seqs", "16", "--max-num-batched-tokens", "512", *vllm),
                ],
                env={
                    **vllm_environment(
                        ADAPTER_MERGE_CACHE=str(cache), VLLM_ENABLE_V1_MULTIPROCESSING="1", NO_COLOR="1"
                    ),
                    **(env or {}),
                },
                stdout=stdout,
                stderr=stream,
                text=True,
            )

    def wait(self, limit: float = 400) -> Server:
        """Until the ready line; the log is in the error when it does not come."""
        while time.monotonic() - self.started < limit:
            if any(line.startswith("ready after") for line in self.lines()):
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise AssertionError("the server did not start:\n" + self.log.read_text()[-6000:])

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to the command and return its exit code."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(timeout=60)

    def count_requests(self, *states: str) -> int:
        """The engine's requests that are "running" or "waiting", by its own figures at /metrics."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        names = tuple(f"vllm:num_requests_{state}{{" for state in states)
        return round(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))

    def post(self, path: str, **content: Any) -> tuple[int, str]:
        """(status, body) of a POST with a JSON body."""
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model: str, prompt: list[int], count: int) -> tuple[int, list[int] | str]:
        """(200, tokens) of a greedy completion of token ids, or (status, error)."""
        status, body = self.post("completions", model=model, prompt=prompt, max_tokens=count, **GREEDY)
        return status, json.loads(body)["choices"][0]["token_ids"] if status == 200 else body


def client_of(server: Server, kind: str = "OpenAI") -> Any:
    import openai  # vLLM depends on it

    return getattr(openai, kind)(base_url=server.url, api_key=KEY, max_retries=0, timeout=120)
