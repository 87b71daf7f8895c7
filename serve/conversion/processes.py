"""Conversions in child processes: an adapter's files cannot crash the server, exhaust its memory or block it.

All code that reads a user's files runs in worker.py, with a memory limit, and is killed when it takes too long. The
server itself only reads the converted folder, which this package wrote and whose hashes it checks.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapter_merge import errors
from adapter_merge.errors import AdapterError, AdapterMergeError, InputError, Problem, UnsupportedError

from .cache import Cache
from .served_folder import Served, describe
from .worker import OUT_OF_MEMORY

START_SECONDS = 300.0  # limit for the start of a process, which imports torch


@dataclass(frozen=True)
class Limits:
    """Memory and time that one conversion may use."""

    nbytes: int = 8 * 10**9  # beyond the memory of a process that has imported torch
    seconds: float = 900.0


class _EndedError(Exception):
    """The process ended, or was killed, before it answered."""


class ConversionProcess:
    """A process that converts adapters one after another; it is started for the first and again after it has ended.

    Use it from one thread only: the process ends with the thread that started it.
    """

    def __init__(self, base: str, cache: Cache, limits: Limits) -> None:
        self.base = base
        self.cache = cache
        self.limits = limits
        self.process: subprocess.Popen[str] | None = None

    def obtain(self, adapter: str | Path) -> Served:
        """Return the served folder of `adapter` with a lease. Raises AdapterMergeError where the conversion fails."""
        lease = self.cache.lease(Path(adapter))
        if lease is not None:
            return describe(lease)
        for _ in range(3):
            answer = self._ask(str(adapter))
            try:
                if "error" in answer:
                    raise self._error(str(adapter), answer)
                lease = self.cache.lease(Path(answer["folder"]))
            finally:
                self._send("")
            if lease is not None:
                return replace(describe(lease), seconds=answer["seconds"])
        raise InputError(f"{adapter}: its entry in the cache was damaged after each of three conversions")

    def start(self) -> None:
        """Start the process unless it runs; return when it is ready."""
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        settings = {
            "base": self.base,
            "cache": str(self.cache.root),
            "max_bytes": self.cache.max_bytes,
            "memory": self.limits.nbytes,
            "parent": os.getpid(),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "adapter_merge.serve.conversion.worker", json.dumps(settings)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},  # the GPU belongs to the engine
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self._read(START_SECONDS)

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _ask(self, adapter: str) -> dict[str, Any]:
        """Return the process's answer for one adapter. Raises AdapterMergeError when it ends or takes too long."""
        try:
            self.start()
            self._send(json.dumps(adapter))
            return self._read(self.limits.seconds)
        except TimeoutError:
            self.close()
            raise UnsupportedError(
                f"{adapter}: its conversion was ended after {self.limits.seconds:.0f} s",
                hint="convert it in advance with adapter-merge cache add, or raise --conversion-seconds",
            ) from None
        except _EndedError:
            code = self.process.wait() if self.process is not None else None
            self.close()
            raise AdapterError(
                f"{adapter}: the process that converted it ended",
                got=f"signal {-code}" if code is not None and code < 0 else f"exit code {code}",
                hint="the server continues; adapter-merge inspect ADAPTER shows what is wrong with it",
            ) from None

    def _send(self, line: str) -> None:
        """Send one line to the process. Where it has ended, the next `_read` raises."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        """Return the next message of the process. Raises TimeoutError or _EndedError."""
        assert self.process is not None
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while not select.select([self.process.stdout], [], [], max(0.0, min(1.0, end - time.monotonic())))[0]:
            if time.monotonic() >= end:
                raise TimeoutError
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise _EndedError
        message: dict[str, Any] = json.loads(line)
        return message

    def _error(self, adapter: str, message: dict[str, Any]) -> AdapterMergeError:
        """Return the error that was raised in the process."""
        if message["error"] == OUT_OF_MEMORY:
            return UnsupportedError(
                f"{adapter}: its conversion needs more than {self.limits.nbytes / 1e9:.3g} GB of memory",
                hint="convert it in advance with adapter-merge cache add, or raise --conversion-memory",
            )
        kind = getattr(errors, message["error"], None)
        problems = [Problem(*each) for each in message["problems"]]
        if isinstance(kind, type) and issubclass(kind, AdapterMergeError):
            return kind(problems)
        return AdapterError(f"{adapter}: cannot be converted ({message['error']}: {problems[0].cause:.300})")


class ConversionProcesses:
    """One ConversionProcess per thread. All are killed and waited for when this process exits."""

    def __init__(self, base: str, cache: Cache, limits: Limits) -> None:
        self.cache = cache
        self._arguments = (base, cache, limits)
        self._local = threading.local()
        self._all: list[ConversionProcess] = []
        atexit.register(self.close)

    def close(self) -> None:
        """End every process. Afterwards no thread may ask for a conversion."""
        for process in self._all:
            process.close()

    @property
    def of_this_thread(self) -> ConversionProcess:
        """The process of the calling thread, created at the first access."""
        if not hasattr(self._local, "process"):
            self._local.process = ConversionProcess(*self._arguments)
            self._all.append(self._local.process)
        process: ConversionProcess = self._local.process
        return process
