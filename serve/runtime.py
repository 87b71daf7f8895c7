"""Loading at run time, inside vLLM's API server: adapters in any form, by request or by name from a folder.

`adapter-merge serve` describes the base, the cache and the adapter folder in one environment variable, and
the plugin puts three things into the API server's process:

    /v1/load_lora_adapter   converts the folder that it is given, then loads the converted one
    LoRAResolver            finds a name that no one has loaded yet in the adapter folder
    every request           is for the adapter as it is on disk now: a folder that was replaced is converted
    and
                            loaded under a new path and a new id, while requests that are running keep the old
                            one

A conversion runs in a thread; requests for other adapters go on meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from .cache import Cache
from .served import Converter, Served, Signature, allowed_rank, check_name, inside, signature

VARIABLE = "ADAPTER_MERGE_SERVE"
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
    seen: Signature


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
        return Source(folder, signature(folder)) if folder is not None else None

    def changed(self, name: str) -> bool:
        """True when the folder behind `name` is not what it was when it was loaded."""
        source = self.sources.get(name)
        if source is None:
            return False
        try:
            return signature(source.folder) != source.seen
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


MODELS = "vllm.entrypoints.openai.models.serving"
SERVING = "vllm.entrypoints.serve.engine.serving"


def install(loader: Loader) -> None:
    """Wrap the API server's three ways to an adapter and register the resolver."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    OpenAIServingModels.load_lora_adapter = wrap_load(OpenAIServingModels.load_lora_adapter, loader)
    OpenAIServingModels.unload_lora_adapter = wrap_unload(OpenAIServingModels.unload_lora_adapter, loader)
    OpenAIServingModels.resolve_lora = wrap_resolve(OpenAIServingModels.resolve_lora, loader)
    for serving in (BaseServing, PoolingBaseServing):
        if "_check_model" in vars(serving):
            serving._check_model = wrap_check(serving._check_model, loader)
    if loader.directory is None:
        return

    async def resolve_lora(self: Any, base_model_name: str, lora_name: str) -> Any:
        return await resolve(loader, lora_name)

    resolver = type("AdapterMergeResolver", (LoRAResolver,), {"resolve_lora": resolve_lora})
    LoRAResolverRegistry.register_resolver("adapter-merge", resolver())


async def resolve(loader: Loader, name: str) -> Any:
    """A LoRARequest for `name` in the adapter folder, None where there is none; vLLM gives it its id."""
    from vllm.lora.request import LoRARequest

    source = loader.find(name)
    if source is None:
        return None
    served = await loader.convert(source.folder)
    loader.keep(name, served, source)
    return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(served.folder))


def wrap_load(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """/v1/load_lora_adapter and --lora-modules: convert, then load; replace without a gap when asked to."""

    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from adapter_merge.merge.errors import AdapterMergeError
        from vllm.lora.request import LoRARequest

        refused = await self._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        name = request.lora_name
        try:
            check_name(name)
            source = None
            given = Path(request.lora_path)
            if loader.directory is not None and not given.is_absolute():
                source = loader.find(request.lora_path)
                given = source.folder if source is not None else given
            served = await loader.convert(given)
        except (AdapterMergeError, OSError) as error:
            return refusal(str(error))
        if not (request.load_inplace and name in self.lora_requests):
            converted = request.model_copy(update={"lora_path": str(served.folder)})
            answer = await original(self, converted, base_model_name)
            if isinstance(answer, str):
                loader.keep(name, served, source)
            return answer
        # vLLM would put the new weights under the old id, below requests that are still running with it.
        async with self.lora_resolver_lock[name]:
            number = self.lora_id_counter.inc(1)
            fresh = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(served.folder))
            try:
                await self.engine_client.add_lora(fresh)
            except Exception as error:
                return refusal(str(error))
            self.lora_requests[name] = fresh
            loader.keep(name, served, source)
        return f"Success: LoRA adapter '{name}' added successfully."

    return load_lora_adapter


def wrap_unload(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """/v1/unload_lora_adapter: give up the hold on the folder too."""

    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        answer = await original(self, request)
        if isinstance(answer, str):
            loader.drop(request.lora_name)
        return answer

    return unload_lora_adapter


def wrap_resolve(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """A name that nobody has loaded: what is wrong with its folder becomes a 400 instead of a 500."""

    async def resolve_lora(self: Any, lora_name: str) -> Any:
        from adapter_merge.merge.errors import AdapterMergeError

        try:
            return await original(self, lora_name)
        except (AdapterMergeError, OSError) as error:
            return refusal(str(error))

    return resolve_lora


def wrap_check(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """Before any request: when its adapter's folder has changed, serve what is there now or refuse."""

    async def _check_model(self: Any, request: Any) -> Any:
        name = request.model
        if name and loader.changed(name) and name in self.models.lora_requests:
            refused = await refresh(loader, self.models, name)
            if refused is not None:
                return refused
        return await original(self, request)

    return _check_model


async def refresh(loader: Loader, models: Any, name: str) -> Any:
    """Swap `name` to what its folder holds now; an error response when that cannot be served."""
    from adapter_merge.merge.errors import AdapterMergeError
    from vllm.lora.request import LoRARequest

    async with models.lora_resolver_lock[name]:
        if not loader.changed(name):
            return None  # another request was faster
        try:
            source = loader.find(name) if loader.directory is not None else None
            if source is None:
                models.lora_requests.pop(name, None)
                loader.drop(name)
                return None
            served = await loader.convert(source.folder)
            number = models.lora_id_counter.inc(1)
            fresh = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(served.folder))
            if str(served.folder) != models.lora_requests[name].lora_path:
                await models.engine_client.add_lora(fresh)
                models.lora_requests[name] = fresh
            loader.keep(name, served, source)
        except (AdapterMergeError, OSError, ValueError) as error:
            models.lora_requests.pop(name, None)
            loader.drop(name)
            return refusal(f"{name} has changed on disk and cannot be served as it is now: {error}")
    return None


def refusal(message: str) -> Any:
    """vLLM's answer to a bad request."""
    from vllm.entrypoints.serve import create_error_response

    logger.warning("%s", message)
    return create_error_response(message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)
