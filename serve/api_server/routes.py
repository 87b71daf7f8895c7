"""Wrappers of the API server's routes that load, unload and look up adapters.

vLLM's own switch for loading at run time (VLLM_ALLOW_RUNTIME_LORA_UPDATING) adds the routes that load and unload, in
/v1 and SageMaker's /adapters. It is on with --allow-loading only: `provide` resolves names of the adapter folder.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from adapter_merge.serve.conversion.served_folder import check_name

from .adapter_loader import Loader, Source
from .client_errors import make_refusal, make_unknown_response
from .metrics import UNKNOWN, UNSERVABLE

logger = logging.getLogger("vllm.adapter_merge")


def install(loader: Loader) -> None:
    """Wrap the functions of the API server that load, unload and look up adapters."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing

    OpenAIServingModels.load_lora_adapter = wrap_load(OpenAIServingModels.load_lora_adapter, loader)
    OpenAIServingModels.unload_lora_adapter = wrap_unload(OpenAIServingModels.unload_lora_adapter, loader)
    OpenAIServingModels.show_available_models = wrap_models(OpenAIServingModels.show_available_models, loader)
    for serving in (BaseServing, PoolingBaseServing):
        if "_check_model" in vars(serving):
            serving._check_model = wrap_check(serving._check_model, loader, raises=serving is PoolingBaseServing)


def wrap_load(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """Wrap /v1/load_lora_adapter, /adapters and --lora-modules: convert the adapter, then load or replace it."""

    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        refused = await self._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        name, path = request.lora_name, request.lora_path
        if loader.settings.named.get(name) == path:
            return await load_named(original, loader, self, request, base_model_name)
        folder = None
        try:
            check_name(name)
            source = await loader.look(loader.find_permitted, path)
            folder = source.folder
            # vLLM would load the new weights under the old id, which running requests still use.
            async with self.lora_resolver_lock[name]:
                refused = await self._check_load_lora_adapter_request(request)
                if refused is None:
                    await admit(loader, self, name, source)
        except Exception as error:
            return make_refusal(loader, error, name, folder)
        return refused or f"Success: LoRA adapter '{name}' added successfully."

    return load_lora_adapter


async def load_named(
    original: Callable[..., Any], loader: Loader, models: Any, request: Any, base_model_name: str | None
) -> Any:
    """Load an adapter that was converted before the start by vLLM's own function, and keep a lease on its folder."""
    name = request.lora_name
    try:
        served = await loader.convert(Path(request.lora_path))
    except Exception as error:
        return make_refusal(loader, error, name)
    changed = copy.copy(request)  # SageMaker's route passes another type than vLLM's
    changed.lora_path = str(served.folder)
    answer = None
    try:
        answer = await original(models, changed, base_model_name)
    finally:
        if isinstance(answer, str):
            loader.keep(name, served, None)
        else:
            served.release()
    return answer


async def admit(loader: Loader, models: Any, name: str, source: Source) -> None:
    """Convert `source` and serve it as `name` under a new id; the caller holds the lock of the name.

    After an exception no lease is kept.
    """
    from vllm.lora.request import LoRARequest

    served = await loader.convert(source.folder)
    try:
        present = models.lora_requests.get(name)
        if present is None or present.lora_path != str(served.folder):
            number = models.lora_id_counter.inc(1)
            present = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(served.folder))
            await models.engine_client.add_lora(present)
    except BaseException:
        served.release()
        raise
    if name in models.lora_requests and models.lora_requests[name] is not present:
        loader.metrics.refreshes.labels(name).inc()
    models.lora_requests[name] = present
    loader.keep(name, served, source)


def wrap_unload(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """Wrap /v1/unload_lora_adapter: also release the lease on the folder."""

    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        answer = await original(self, request)
        if isinstance(answer, str):
            loader.drop(request.lora_name)
        return answer

    return unload_lora_adapter


def wrap_models(original: Callable[..., Any], loader: Loader) -> Callable[..., Any]:
    """Wrap /v1/models: also list the adapters of the adapter folder that are not loaded yet."""

    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        base = models.data[0]
        listed = {card.id for card in models.data}
        for name in await loader.look(loader.list_offered):
            if name not in listed:
                about = {"id": name, "root": None, "parent": base.id, "max_model_len": None}
                models.data.append(base.model_copy(update={**about, "permission": [type(base.permission[0])()]}))
        return models

    return show_available_models


def wrap_check(original: Callable[..., Any], loader: Loader, raises: bool = False) -> Callable[..., Any]:
    """Wrap the check of a request's model: load its adapter in the present state of its folder, or refuse the request.

    raises: raise a refusal as ValueError, for callers that ignore the returned value.
    """

    async def _check_model(self: Any, request: Any) -> Any:
        if not self._is_model_supported(request.model):
            refused = await provide(loader, self.models, request.model)
            if refused is not None:
                is_known = refused.error.code != HTTPStatus.NOT_FOUND
                loader.metrics.refused.labels(UNSERVABLE if is_known else UNKNOWN).inc()
            if refused is not None and raises:
                raise ValueError(refused.error.message)
            if refused is not None:
                return refused
        answer = await original(self, request)
        if answer is None:
            loader.metrics.requests.labels(request.model or self.models.model_name()).inc()
        return answer

    return _check_model


async def provide(loader: Loader, models: Any, name: str) -> Any:
    """Load `name` in its present state on disk; return an error response where it is missing or cannot be served."""
    if name in models.lora_requests and not await loader.changed(name):
        return None
    source = None
    try:
        source = await loader.look(loader.find_current, name)
        if source is not None:
            async with models.lora_resolver_lock[name]:
                if name not in models.lora_requests or await loader.changed(name):
                    await admit(loader, models, name, source)
            return None
        forget(loader, models, name)
        return make_unknown_response(models, name, await loader.look(loader.list_offered))
    except Exception as error:
        forget(loader, models, name)
        return make_refusal(loader, error, name, source.folder if source is not None else None)


def forget(loader: Loader, models: Any, name: str) -> None:
    """Remove `name` from vLLM's models and from the loader."""
    models.lora_requests.pop(name, None)
    loader.drop(name)
