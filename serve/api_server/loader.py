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
from adapter_merge.serve.conversion.served import (
    Served,
    Signature,
    allowed_rank,
    file_signature,
    folders,
    inside,
    refuse_links_out,
    signature,
)
from adapter_merge.serve.conversion.stated_settings import beside

from .metrics import Metrics

VARIABLE = "ADAPTER_MERGE_SERVE"
T = TypeVar("T")
LOOK_SECONDS = 1.0  # after which a request looks at all files of its adapter again


@dataclass(frozen=True)
class Settings:
    """What `adapter-merge serve` hands to the server that it starts."""

    base: str
    cache: str
    max_bytes: int
    max_rank: int
    adapter_dir: str | None = None
    roots: tuple[str, ...] = ()  # folders that /v1/load_lora_adapter may load from, besides adapter_dir
    named: dict[str, str] = field(default_factory=dict)  # given at start: name -> served folder
    parent: int | None = None  # the process that started the server; it must not outlive it
    conversion_bytes: int = Limits.nbytes
    conversion_seconds: float = Limits.seconds

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Settings | None:
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None


@dataclass
class Source:
    """Where an adapter name came from, to see whether it has changed since."""

    folder: Path
    paths: tuple[Path, ...]  # what its read_options.json names besides
    seen: Signature
    weights: Path  # the largest file: one that a replacement changes
    looked: float = field(default_factory=time.monotonic)  # when all files were looked at

    @classmethod
    def at(cls, folder: Path) -> Source:
        paths = beside(folder).paths
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else [folder]
        weights = max(files, key=lambda file: file.stat().st_size, default=folder)
        return cls(folder, paths, signature(folder, *paths), weights)

    def same(self) -> bool:
        """False when it has changed, or cannot be read any more.

        One look at the largest file, which sees a folder that was replaced and weights that were written anew, and at
        all files when that is LOOK_SECONDS ago.
        """
        try:
            if file_signature(self.weights) not in self.seen:
                return False
            if time.monotonic() - self.looked >= LOOK_SECONDS:
                if signature(self.folder, *self.paths) != self.seen:
                    return False
                self.looked = time.monotonic()
            return True
        except OSError:
            return False


class Loader:
    """The adapters of one API server: where each came from, and a hold on the folder of each.

    What reads a disk runs in threads: looks at folders in their own, so that no request waits for the conversion of
    another one's adapter. Conversions run in processes of their own, one per converting thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = Path(settings.adapter_dir) if settings.adapter_dir else None
        self.roots = [Path(root) for root in (settings.adapter_dir, *settings.roots) if root is not None]
        self.cache = Cache(Path(settings.cache), settings.max_bytes)
        limits = Limits(settings.conversion_bytes, settings.conversion_seconds)
        self.conversions = ConversionProcesses(settings.base, self.cache, limits)
        self.held: dict[str, Served] = {}
        # Requests that still run may make vLLM read a replaced adapter's folder again: hold a while longer.
        self.retired: deque[Served] = deque()
        self.sources: dict[str, Source] = {}
        self.metrics = Metrics()
        self.looking = ThreadPoolExecutor(4, "adapter-merge-look")
        self.converting = ThreadPoolExecutor(2, "adapter-merge-convert")
        self.converting.submit(self.metrics.measure, self.cache)

    async def look(self, function: Callable[..., T], *arguments: object) -> T:
        """`function` in a thread for short work on a disk."""
        return await asyncio.get_running_loop().run_in_executor(self.looking, function, *arguments)

    async def convert(self, adapter: str | Path) -> Served:
        """The served folder of `adapter`, held. Raises AdapterMergeError when this server cannot serve it."""
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
            served = self.conversions.own.obtain(adapter)
        except Exception:
            self.metrics.failures.inc()
            raise
        try:
            if served.seconds is not None:
                self.metrics.converted(served.seconds, self.cache)
        except BaseException:
            served.release()
            raise
        return served

    def keep(self, name: str, served: Served, source: Source | None) -> None:
        """`name` is served from this folder now."""
        self.drop(name)
        self.held[name] = served
        if source is not None:
            self.sources[name] = source

    def drop(self, name: str) -> None:
        """`name` is not served any more; its folder is released after many others were."""
        self.sources.pop(name, None)
        served = self.held.pop(name, None)
        if served is not None:
            self.retired.append(served)
        while len(self.retired) > 64:
            self.retired.popleft().release()

    def find(self, name: str) -> Source | None:
        """The folder called `name` in the adapter folder. Raises InputError for a name that must not be used."""
        folder = inside(self.directory, name) if self.directory is not None else None
        return Source.at(folder) if folder is not None else None

    def permitted(self, path: str | Path) -> Source:
        """The adapter at `path`, which is absolute or relative to a root.

        Raises InputError for everything outside of the roots, whether it exists or not: links are resolved first,
        and nothing outside is looked at.
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

    def current(self, name: str) -> Source | None:
        """Where `name` is now: the path that it was loaded from, else its folder in the adapter folder."""
        source = self.sources.get(name)
        if source is None:
            return self.find(name)
        return self.permitted(source.folder) if source.folder.exists() else None

    def told(self, error: Exception, name: str, folder: Path | None = None) -> str:
        """What a client is told of an error: the causes, with names in place of this server's paths.

        What was expected and got stays in the log: it may list folders.
        """
        if isinstance(error, AdapterMergeError):
            text = "; ".join(problem.cause for problem in error.problems)
        else:
            text = "its files cannot be read" if isinstance(error, OSError) else str(error)
        return f"the adapter {name} cannot be served: {self.without_paths(text, folder, name)}"

    def without_paths(self, text: str, folder: Path | None = None, name: str = "adapter") -> str:
        """`text` with names in place of this server's paths; `folder` becomes `name`."""
        shown = [(root, "adapters") for root in self.roots]
        shown += [(self.cache.root, "cache"), (Path(self.settings.base), "base")]
        for path, label in shown if folder is None else [(folder, name), *shown]:
            for spelling in (str(path.resolve()), str(path)):
                text = text.replace(spelling, label)
        return text

    async def changed(self, name: str) -> bool:
        """True when the folder behind `name` is not what it was when it was loaded."""
        source = self.sources.get(name)
        return False if source is None else not await self.look(source.same)

    def offered(self) -> list[str]:
        """Names of the adapter folder that hold a file, loaded or not."""
        if self.directory is None:
            return []
        directory = self.directory
        return [name for name in folders(directory) if any(entry.is_file() for entry in os.scandir(directory / name))]
