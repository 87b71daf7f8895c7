"""Conversions in a process of their own: no adapter's files can end the server, take its memory or hold it for ever.

Whatever reads a foreign file runs in worker.py, under a limit of memory, and is killed when it takes too long. The
server reads only the folder that comes out, which this package wrote and whose hashes are compared.
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
from .served import Served, describe
from .worker import OUT_OF_MEMORY

START_SECONDS = 300.0  # for a process to import torch on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one conversion may take."""

    nbytes: int = 8 * 10**9  # on top of a process with torch
    seconds: float = 900.0


class _EndedError(Exception):
    """The process ended, or was ended, before its answer."""


class ConversionProcess:
    """One process that converts one adapter after another; started with the first, and anew after its end.

    For one thread at a time; the process lives no longer than the thread that started it.
    """

    def __init__(self, base: str, cache: Cache, limits: Limits) -> None:
        self.base = base
        self.cache = cache
        self.limits = limits
        self.process: subprocess.Popen[str] | None = None

    def obtain(self, adapter: str | Path) -> Served:
        """The served folder of `adapter`, held. Raises AdapterMergeError when it cannot be had within the limits."""
        held = self.cache.lease(Path(adapter))
        if held is not None:
            return describe(held)
        for _ in range(3):
            found = self._ask(str(adapter))
            try:
                if "error" in found:
                    raise self._error(str(adapter), found)
                lease = self.cache.lease(Path(found["folder"]))
            finally:
                self._send("")
            if lease is not None:
                return replace(describe(lease), seconds=found["seconds"])
        raise InputError(f"{adapter}: its entry in the cache was damaged again and again")

    def start(self) -> None:
        """Start the process when there is none; returns when it is ready."""
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
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},  # the engine has its memory
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

    # -- inside ------------------------------------------------------------------------------------------

    def _ask(self, adapter: str) -> dict[str, Any]:
        """The process's answer for one adapter. Raises AdapterMergeError when it ends or takes too long."""
        try:
            self.start()
            self._send(json.dumps(adapter))
            return self._read(self.limits.seconds)
        except TimeoutError:
            self.close()
            raise UnsupportedError(
                f"{adapter}: its conversion was ended after {self.limits.seconds:.0f} s",
                hint="convert it before with adapter-merge cache add, or raise --conversion-seconds",
            ) from None
        except _EndedError:
            code = self.process.wait() if self.process is not None else None
            self.close()
            raise AdapterError(
                f"{adapter}: the process that converted it ended",
                got=f"signal {-code}" if code is not None and code < 0 else f"exit code {code}",
                hint="the server goes on; adapter-merge inspect looks at the adapter alone",
            ) from None

    def _send(self, line: str) -> None:
        """One line to the process; an end of it is seen by the next one that reads."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        """One line of the process, which it sends whole. Raises TimeoutError or _EndedError."""
        assert self.process is not None
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while not select.select([self.process.stdout], [], [], max(0.0, min(1.0, end - time.monotonic())))[0]:
            if time.monotonic() >= end:
                raise TimeoutError
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise _EndedError
        found: dict[str, Any] = json.loads(line)
        return found

    def _error(self, adapter: str, found: dict[str, Any]) -> AdapterMergeError:
        """The error that was raised in the process."""
        if found["error"] == OUT_OF_MEMORY:
            return UnsupportedError(
                f"{adapter}: its conversion needs more than {self.limits.nbytes / 1e9:.3g} GB of memory",
                hint="convert it before with adapter-merge cache add, or raise --conversion-memory",
            )
        kind = getattr(errors, found["error"], None)
        problems = [Problem(*each) for each in found["problems"]]
        if isinstance(kind, type) and issubclass(kind, AdapterMergeError):
            return kind(problems)
        return AdapterError(f"{adapter}: cannot be converted ({found['error']}: {problems[0].cause:.300})")


class ConversionProcesses:
    """A ConversionProcess for each thread that asks for one. All are ended, and waited for, when this process exits."""

    def __init__(self, base: str, cache: Cache, limits: Limits) -> None:
        self.cache = cache
        self._arguments = (base, cache, limits)
        self._own = threading.local()
        self._all: list[ConversionProcess] = []
        atexit.register(self.close)

    def close(self) -> None:
        """End every process. No thread may ask for a conversion any more."""
        for process in self._all:
            process.close()

    @property
    def own(self) -> ConversionProcess:
        """This thread's."""
        if not hasattr(self._own, "process"):
            self._own.process = ConversionProcess(*self._arguments)
            self._all.append(self._own.process)
        process: ConversionProcess = self._own.process
        return process
