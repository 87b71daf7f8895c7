"""The adapters of one API server: its settings, the source of each adapter, and their conversion."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from adapter_merge.errors import AdapterMergeError, InputError
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.processes import ConversionProcesses, Limits
from adapter_merge.serve.conversion.served_folder import (
    Served,
    Signature,
    allowed_rank,
    file_signature,
    folders,
    inside,
    refuse_links_out,
    signature,
)
from adapter_merge.serve.conversion.stated_settings import read_settings_beside

from .metrics import Metrics

VARIABLE = "ADAPTER_MERGE_SERVE"
T = TypeVar("T")
LOOK_SECONDS = 1.0  # a request examines all files of its adapter at most this often


@dataclass(frozen=True)
class Settings:
    """The settings that `adapter-merge serve` passes to the server that it starts, in one environment variable."""

    base: str
    cache: str
    max_bytes: int
    max_rank: int
    adapter_dir: str | None = None
    roots: tuple[str, ...] = ()  # folders that /v1/load_lora_adapter may load from, besides adapter_dir
    named: dict[str, str] = field(default_factory=dict)  # adapters named at the start: name -> served folder
    parent: int | None = None  # id of the process that started the server, which ends with it
    conversion_bytes: int = Limits.nbytes
    conversion_seconds: float = Limits.seconds

    def as_text(self) -> str:
        """Return the settings as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Settings | None:
        """Read the settings from the environment; None where `adapter-merge serve` did not start this process."""
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None


@dataclass
class Source:
    """The files of a loaded adapter and their state, to detect changes."""

    folder: Path
    paths: tuple[Path, ...]  # further files that its read_options.json names
    state: Signature  # of all files, when they were read
    weights: Path  # the largest file, which any replacement of the adapter changes
    examined: float = field(default_factory=time.monotonic)  # time of the last examination of all files

    @classmethod
    def at(cls, folder: Path) -> Source:
        """Return the source in `folder`, with the present state of its files."""
        paths = read_settings_beside(folder).paths
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else [folder]
        weights = max(files, key=lambda file: file.stat().st_size, default=folder)
        return cls(folder, paths, signature(folder, *paths), weights)

    def is_unchanged(self) -> bool:
        """Return False where a file has changed or cannot be read.

        Examines the largest file, which shows a replaced folder and rewritten weights; and all files where the last
        such examination was LOOK_SECONDS ago.
        """
        try:
            if file_signature(self.weights) not in self.state:
                return False
            if time.monotonic() - self.examined >= LOOK_SECONDS:
                if signature(self.folder, *self.paths) != self.state:
                    return False
                self.examined = time.monotonic()
            return True
        except OSError:
            return False


class Loader:
    """The adapters of one API server: the source of each, and a lease on its served folder.

    Disk access runs in threads. Short reads have their own threads, so that a request does not wait for the conversion
    of another request's adapter. Conversions run in child processes, one per converting thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = Path(settings.adapter_dir) if settings.adapter_dir else None
        self.roots = [Path(root) for root in (settings.adapter_dir, *settings.roots) if root is not None]
        self.cache = Cache(Path(settings.cache), settings.max_bytes)
        limits = Limits(settings.conversion_bytes, settings.conversion_seconds)
        self.conversions = ConversionProcesses(settings.base, self.cache, limits)
        self.served: dict[str, Served] = {}
        # vLLM may read a replaced adapter's folder again for requests that still run, so its lease is kept for a while.
        self.retired: deque[Served] = deque()
        self.sources: dict[str, Source] = {}
        self.metrics = Metrics()
        self.looking = ThreadPoolExecutor(4, "adapter-merge-look")
        self.converting = ThreadPoolExecutor(2, "adapter-merge-convert")
        self.converting.submit(self.metrics.measure, self.cache)

    async def look(self, function: Callable[..., T], *arguments: object) -> T:
        """Run `function`, which reads a disk for a short time, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.looking, function, *arguments)

    async def convert(self, adapter: str | Path) -> Served:
        """Return the served folder of `adapter` with a lease. Raises AdapterMergeError where it cannot be served."""
        from adapter_merge.errors import UnsupportedError

        served = await asyncio.get_running_loop().run_in_executor(self.converting, self._obtain, adapter)
        try:
            if allowed_rank(served.rank) > self.settings.max_rank:
                raise UnsupportedError(
                    f"{adapter}: rank {served.rank} is above this server's --max-lora-rank",
                    expected=f"at most {self.settings.max_rank}",
                    hint=f"start the server with -- --max-lora-rank {allowed_rank(served.rank)}",
                )
        except BaseException:
            served.release()
            raise
        return served

    def _obtain(self, adapter: str | Path) -> Served:
        try:
            served = self.conversions.of_this_thread.obtain(adapter)
        except Exception:
            self.metrics.failures.inc()
            raise
        try:
            if served.seconds is not None:
                self.metrics.count_conversion(served.seconds, self.cache)
        except BaseException:
            served.release()
            raise
        return served

    def keep(self, name: str, served: Served, source: Source | None) -> None:
        """Record that `name` is now served from this folder."""
        self.drop(name)
        self.served[name] = served
        if source is not None:
            self.sources[name] = source

    def drop(self, name: str) -> None:
        """Record that `name` is no longer served; its lease is released after 64 more adapters were dropped."""
        self.sources.pop(name, None)
        served = self.served.pop(name, None)
        if served is not None:
            self.retired.append(served)
        while len(self.retired) > 64:
            self.retired.popleft().release()

    def find(self, name: str) -> Source | None:
        """Return the source `name` in the adapter folder, or None. Raises InputError for a bad name."""
        folder = inside(self.directory, name) if self.directory is not None else None
        return Source.at(folder) if folder is not None else None

    def find_permitted(self, path: str | Path) -> Source:
        """Return the source at `path`, which is absolute or relative to a root.

        Raises InputError for every path outside the roots, whether it exists or not: links are resolved first, and
        nothing outside is read.
        """
        for root in self.roots:
            folder = root / path
            if folder.resolve().is_relative_to(root.resolve()) and folder.exists():
                refuse_links_out(root, folder)
                return Source.at(folder)
        raise InputError(
            "there is no such adapter in the folders that this server may load from",
            expected="a path in --adapter-dir or --adapter-root",
        )

    def find_current(self, name: str) -> Source | None:
        """Return the present source of `name`: the path it was loaded from, else its folder in the adapter folder."""
        source = self.sources.get(name)
        if source is None:
            return self.find(name)
        return self.find_permitted(source.folder) if source.folder.exists() else None

    def describe_error(self, error: Exception, name: str, folder: Path | None = None) -> str:
        """Return an error's message for clients: the causes, with names in place of this server's paths.

        Expected and actual values are only logged, since they may list folders.
        """
        if isinstance(error, AdapterMergeError):
            text = "; ".join(problem.cause for problem in error.problems)
        else:
            text = "its files cannot be read" if isinstance(error, OSError) else str(error)
        return f"the adapter {name} cannot be served: {self.without_paths(text, folder, name)}"

    def without_paths(self, text: str, folder: Path | None = None, name: str = "adapter") -> str:
        """Return `text` with names in place of this server's paths; `folder` becomes `name`."""
        shown = [(root, "adapters") for root in self.roots]
        shown += [(self.cache.root, "cache"), (Path(self.settings.base), "base")]
        for path, label in shown if folder is None else [(folder, name), *shown]:
            for spelling in (str(path.resolve()), str(path)):
                text = text.replace(spelling, label)
        return text

    async def changed(self, name: str) -> bool:
        """Return True where the files of `name` have changed since it was loaded."""
        source = self.sources.get(name)
        return False if source is None else not await self.look(source.is_unchanged)

    def list_offered(self) -> list[str]:
        """Return the names of all adapters in the adapter folder, loaded or not."""
        if self.directory is None:
            return []
        directory = self.directory
        return [name for name in folders(directory) if any(entry.is_file() for entry in os.scandir(directory / name))]
