"""The API server's ways to an adapter, wrapped: loading, unloading, resolving a name, and every request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from .loader import Loader
from .served import check_name

logger = logging.getLogger("vllm.adapter_merge")


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
        from vllm.lora.request import LoRARequest

        from adapter_merge.errors import AdapterMergeError

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
        from adapter_merge.errors import AdapterMergeError

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
    from vllm.lora.request import LoRARequest

    from adapter_merge.errors import AdapterMergeError

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
