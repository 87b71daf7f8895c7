"""Loading of adapters while vLLM's API server runs: of any format, by request or by name from a folder.

`adapter-merge serve` describes the base, the cache and the adapter folder in one environment variable, and the plugin
changes two things in the API server's process:

    /v1/load_lora_adapter   converts the given folder, then loads the converted one
    every request           uses the present state of its adapter on disk: a name that is not loaded yet is looked up
                            in the adapter folder; a replaced folder is converted and loaded under a new path and a new
                            id, while running requests keep the old one

routes.py implements both, adapter_loader.py holds the shared state, and this file installs them. A conversion runs in a
child process, and requests for other adapters continue meanwhile.
"""

from __future__ import annotations

import inspect
import logging
import signal

from adapter_merge.serve.conversion.process_limits import die_with_parent
from adapter_merge.serve.patches.symbols import find

from .adapter_loader import Loader, Settings
from .routes import install

MODELS = "vllm.entrypoints.openai.models.serving"
SERVING = "vllm.entrypoints.serve.engine.serving"
logger = logging.getLogger("vllm.adapter_merge")
FUNCTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    (MODELS, "OpenAIServingModels.load_lora_adapter"): ("self", "request", "base_model_name"),
    (MODELS, "OpenAIServingModels.unload_lora_adapter"): ("self", "request"),
    (MODELS, "OpenAIServingModels.show_available_models"): ("self",),
    (MODELS, "OpenAIServingModels._check_load_lora_adapter_request"): ("self", "request"),
    (SERVING, "BaseServing._check_model"): ("self", "request"),
    (SERVING, "BaseServing._is_model_supported"): ("self", "model_name"),
    ("vllm.entrypoints.serve", "create_error_response"): ("message", "err_type", "status_code"),
}
ATTRIBUTES = ("lora_requests", "lora_id_counter", "lora_resolver_lock", "engine_client")  # that __init__ sets

loader: Loader | None = None  # set in an API server that `adapter-merge serve` started


def register() -> None:
    """Extend the API server of this process when `adapter-merge serve` started it."""
    import multiprocessing

    settings = Settings.from_environment()
    if settings is None or multiprocessing.parent_process() is not None:
        return
    if settings.parent is not None:
        die_with_parent(settings.parent, signal.SIGTERM)
    problems = find_missing()
    if problems:
        logger.error(
            "adapter-merge does not support this vLLM's API server (%s): adapters in their own formats cannot be "
            "loaded at run time.",
            "; ".join(problems),
        )
        return
    global loader
    loader = Loader(settings)
    install(loader)


def find_missing() -> list[str]:
    """Return the functions and parameters that this vLLM's API server lacks, as sentences."""
    problems: list[str] = []
    for (module, path), parameters in FUNCTIONS.items():
        function = find(module, path, problems)
        if function is not None:
            absent = [name for name in parameters if name not in inspect.signature(function).parameters]
            if absent:
                problems.append(f"{module}.{path} has no parameter {', '.join(absent)}")
    models = find(MODELS, "OpenAIServingModels.__init__", problems)
    names = models.__code__.co_names if models is not None else ()
    for name in ATTRIBUTES:
        if models is not None and name not in names:
            problems.append(f"OpenAIServingModels has no {name}")
    return problems
