"""Loading at run time, inside vLLM's API server: adapters in any form, by request or by name from a folder.

`adapter-merge serve` describes the base, the cache and the adapter folder in one environment variable, and
the plugin puts three things into the API server's process:

    /v1/load_lora_adapter   converts the folder that it is given, then loads the converted one
    LoRAResolver            finds a name that no one has loaded yet in the adapter folder
    every request           is for the adapter as it is on disk now: a folder that was replaced is converted
                            and loaded under a new path and a new id, while requests that are running keep
                            the old one

routes.py has the three; this file has what they share.

A conversion runs in a thread; requests for other adapters go on meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from .cache import Cache
from .served import Converter, Served, Signature, allowed_rank, inside, signature
from .stating import beside

VARIABLE = "ADAPTER_MERGE_SERVE"
MODELS = "vllm.entrypoints.openai.models.serving"
SERVING = "vllm.entrypoints.serve.engine.serving"
logger = logging.getLogger("vllm.adapter_merge")


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
        from adapter_merge.merge.errors import UnsupportedError

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


def register() -> None:
    """Extend the API server of this process when `adapter-merge serve` started it."""
    import multiprocessing

    settings = Settings.from_environment()
    if settings is None or multiprocessing.parent_process() is not None:
        return
    if settings.parent is not None:
        end_with(settings.parent)
    problems = missing()
    if problems:
        logger.error(
            "adapter-merge does not know this vLLM's API server (%s): adapters in their own formats cannot be "
            "loaded at run time.",
            "; ".join(problems),
        )
        return
    from .routes import install

    install(Loader(settings))


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when `parent`, which started it, dies in whatever way."""
    import ctypes
    import signal

    if os.getppid() == parent and hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, linux/prctl.h


def missing() -> list[str]:
    """What this vLLM's API server lacks of what is wrapped here, in words."""
    from .symbols import find

    problems: list[str] = []
    wanted: dict[tuple[str, str], tuple[str, ...]] = {
        (MODELS, "OpenAIServingModels.load_lora_adapter"): ("self", "request", "base_model_name"),
        (MODELS, "OpenAIServingModels.unload_lora_adapter"): ("self", "request"),
        (MODELS, "OpenAIServingModels.resolve_lora"): ("self", "lora_name"),
        (MODELS, "OpenAIServingModels._check_load_lora_adapter_request"): ("self", "request"),
        (SERVING, "BaseServing._check_model"): ("self", "request"),
        ("vllm.lora.resolver", "LoRAResolverRegistry.register_resolver"): ("resolver_name", "resolver"),
        ("vllm.entrypoints.serve", "create_error_response"): ("message", "err_type", "status_code"),
    }
    for (module, path), parameters in wanted.items():
        found = find(module, path, problems)
        if found is not None:
            lost = [name for name in parameters if name not in inspect.signature(found).parameters]
            if lost:
                problems.append(f"{module}.{path} has no parameter {', '.join(lost)}")
    models = find(MODELS, "OpenAIServingModels.__init__", problems)
    names = models.__code__.co_names if models is not None else ()
    for name in ("lora_requests", "lora_id_counter", "lora_resolver_lock", "engine_client"):
        if models is not None and name not in names:
            problems.append(f"OpenAIServingModels has no {name}")
    return problems
