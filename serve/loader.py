"""The adapters of one API server: settings from the command, where each adapter came from, conversions."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from .cache import Cache
from .served import Converter, Served, Signature, allowed_rank, inside, signature
from .stating import beside

VARIABLE = "ADAPTER_MERGE_SERVE"


@dataclass(frozen=True)
class Settings:
    """What `adapter-merge serve` hands to the server that it starts."""

    base: str
    cache: str
    max_bytes: int
    max_rank: int
    adapter_dir: str | None = None
    parent: int | None = None  # the process that started the server; it must not outlive it

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

    @classmethod
    def at(cls, folder: Path) -> Source:
        paths = beside(folder).paths
        return cls(folder, paths, signature(folder, *paths))

    def same(self) -> bool:
        return signature(self.folder, *self.paths) == self.seen


class Loader:
    """The adapters of one API server: where each came from, and a hold on the folder of each."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = Path(settings.adapter_dir) if settings.adapter_dir else None
        self.converter = Converter(settings.base, Cache(Path(settings.cache), settings.max_bytes))
        self.held: dict[str, Served] = {}
        # Requests that still run may make vLLM read a replaced adapter's folder again: hold a while longer.
        self.retired: deque[Served] = deque()
        self.sources: dict[str, Source] = {}

    async def convert(self, adapter: str | Path) -> Served:
        """The served folder of `adapter`. Raises AdapterMergeError when this server cannot serve it."""
        from adapter_merge.errors import UnsupportedError

        served = await asyncio.to_thread(self.converter.obtain, adapter)
        if allowed_rank(served.rank) > self.settings.max_rank:
            raise UnsupportedError(
                f"{adapter}: rank {served.rank} is above this server's --max-lora-rank",
                expected=f"at most {self.settings.max_rank}",
                hint=f"start the server with -- --max-lora-rank {allowed_rank(served.rank)}",
            )
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
            old = self.retired.popleft()
            if old.lease is not None:
                old.lease.release()

    def find(self, name: str) -> Source | None:
        """The folder called `name` in the adapter folder. Raises InputError for a name that must not be used."""
        folder = inside(self.directory, name) if self.directory is not None else None
        return Source.at(folder) if folder is not None else None

    def changed(self, name: str) -> bool:
        """True when the folder behind `name` is not what it was when it was loaded."""
        source = self.sources.get(name)
        if source is None:
            return False
        try:
            return not source.same()
        except OSError:
            return True
