"""The classes and functions of vLLM that the plugin replaces or calls, checked before any of them is replaced.

vLLM promises nothing about these names. `missing()` lists whatever a version lacks; with anything missing the
plugin changes nothing, and vLLM then refuses folders with row scales by itself (`use_dora` is true in them).
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from .row_scale import LINEAR_CLASSES

OLDEST, NEWEST = "0.28", "0.32"

# module -> object -> the parameters that are passed to it, or read when it is wrapped
FUNCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.lora.utils": {
        "from_layer": ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config"),
        "parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    },
    "vllm.lora.layers": {
        "BaseLayerWithLoRA.reset_lora": ("self", "index"),
        "BaseLayerWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
        "BaseLayerWithLoRA.set_mapping": ("self", "punica_wrapper"),
        "BaseLayerWithLoRA.slice_lora_b": ("self", "lora_b"),
        "MergedColumnParallelLinearWithLoRA.expand_packed_lora": ("self", "lora_a", "lora_b"),
    },
    "vllm.lora.layers.utils": {"LoRAMapping": ("index_mapping", "prompt_mapping", "is_prefill")},
    "vllm.lora.lora_model": {
        "LoRAModel.from_local_checkpoint": (
            "lora_dir",
            "expected_lora_modules",
            "peft_helper",
            "weights_mapper",
            "skip_prefixes",
        ),
        "LoRAModel.get_lora": ("self", "module_name"),
        "LoRAModel._should_skip_module": ("module_name", "skip_prefixes"),
    },
    "vllm.lora.peft_helper": {
        "PEFTHelper.from_local_dir": ("lora_path", "max_position_embeddings"),
        "PEFTHelper.validate_legal": ("self", "lora_config"),
    },
    "vllm.lora.model_manager": {
        "LoRAModelManager._add_adapter": ("self", "lora"),
        "LoRAModelManager.activate_adapter": ("self", "lora_id"),
        "LoRAModelManager.remove_adapter": ("self", "adapter_id"),
        "LoRAModelManager.set_adapter_mapping": ("self", "mapping"),
    },
    "vllm.config.lora": {"LoRAConfig.compute_hash": ("self",)},
    "vllm.distributed.parallel_state": {"get_pp_group": ()},
    "vllm.v1.core.kv_cache_utils": {"_gen_lora_extra_hash_keys": ("request",)},
    "vllm.lora.request": {"LoRARequest.__eq__": ("self", "value"), "LoRARequest.__hash__": ("self",)},
}

# module -> function -> attributes that it sets or reads by these names
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.config.vllm": {"VllmConfig.compute_hash": ("lora_config", "compute_hash")},
    "vllm.compilation.caching": {"aot_compile_hash_factors": ("compute_hash",)},
    "vllm.lora.model_manager": {
        "LoRAModelManager.__init__": (
            "modules",
            "packed_modules",
            "lora_index_to_id",
            "_registered_adapters",
        ),
        "LoRAModelManager._add_adapter": ("_create_merged_loras_inplace", "_registered_adapters"),
        "LRUCacheLoRAModelManager.add_adapter": ("_add_adapter",),
        "LRUCacheLoRAModelManager.activate_adapter": ("activate_adapter",),
    },
    "vllm.v1.core.kv_cache_utils": {
        "_gen_lora_extra_hash_keys": ("lora_request", "lora_name"),
        "generate_block_hash_extra_keys": ("_gen_lora_extra_hash_keys",),
    },
    "vllm.lora.request": {"LoRARequest.__hash__": ("lora_name",)},
    "vllm.lora.utils": {"from_layer": ("_all_lora_classes", "can_replace_layer", "create_lora_weights")},
    "vllm.lora.layers.base_linear": {
        "BaseLinearLayerWithLoRA.__init__": ("base_layer", "tp_size", "device"),
        "BaseLinearLayerWithLoRA.create_lora_weights": ("lora_b_stacked", "n_slices"),
    },
    "vllm.lora.layers.column_parallel_linear": {
        "MergedColumnParallelLinearWithLoRA.__init__": ("output_slices", "n_slices"),
        "MergedColumnParallelLinearWithLoRA.set_lora": ("reset_lora", "expand_packed_lora", "slice_lora_b"),
    },
    "vllm.lora.layers.row_parallel_linear": {"RowParallelLinearWithLoRA.__init__": ("output_size",)},
    "vllm.lora.punica_wrapper.punica_base": {
        "PunicaWrapperBase.__init__": ("_token_lora_indices",),
        "PunicaWrapperBase._update_base_metadata": ("_token_lora_indices", "copy_"),
    },
    "vllm.lora.worker_manager": {
        "WorkerLoRAManager._load_adapter": ("from_local_dir", "validate_legal", "from_local_checkpoint"),
    },
}


def missing() -> list[str]:
    """Return what this vLLM lacks of the above, in words; empty for a version that the plugin supports."""
    problems: list[str] = []
    for module, functions in FUNCTIONS.items():
        for path, parameters in functions.items():
            found = find(module, path, problems)
            if found is not None:
                have = inspect.signature(found).parameters
                lost = [name for name in parameters if name not in have]
                if lost:
                    problems.append(f"{module}.{path} has no parameter {', '.join(lost)}")
    for module, functions in ATTRIBUTES.items():
        for path, attributes in functions.items():
            found = find(module, path, problems)
            if found is not None:
                names = inspect.unwrap(found).__code__.co_names
                lost = [name for name in attributes if name not in names]
                if lost:
                    problems.append(f"{module}.{path} does not use {', '.join(lost)}")
    for name in LINEAR_CLASSES:
        apply = find("vllm.lora.layers", f"{name}.apply", problems)
        if apply is not None and list(inspect.signature(apply).parameters) != ["self", "x", "bias"]:
            problems.append(f"vllm.lora.layers.{name}.apply is not apply(self, x, bias)")
        find("vllm.lora.layers", f"{name}.create_lora_weights", problems)
    classes = find("vllm.lora.utils", "_all_lora_classes", problems)
    if classes is not None:
        lost = sorted(set(LINEAR_CLASSES) - {cls.__name__ for cls in classes})
        if lost:
            problems.append(f"vllm.lora.utils._all_lora_classes lacks {', '.join(lost)}")
    return problems


def find(module: str, path: str, problems: list[str]) -> Any:
    """The object at `path` in `module`; None, with a line in `problems`, when it is not there."""
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        problems.append(f"{module}.{path} is not there ({error})")
        return None
    return found


def native_dora() -> bool:
    """True when this vLLM accepts DoRA adapters by itself."""
    from vllm.lora.peft_helper import PEFTHelper

    class Config:
        max_lora_rank = 8
        bias_enabled = False

    try:
        config = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(Config())
    except ValueError as error:
        if "dora" in str(error).lower():
            return False
        raise
    return True
