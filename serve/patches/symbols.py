"""The classes and functions of vLLM that the plugin replaces or calls, checked before any of them is replaced.

They are not part of vLLM's public API. `find_missing()` lists what a version lacks; where anything is missing, the
plugin changes nothing, and vLLM refuses folders with row scales (their config states `use_dora`).
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


def find_missing() -> list[str]:
    """Return the classes, functions and parameters that this vLLM lacks, as sentences; [] for a supported version."""
    problems: list[str] = []
    for module, functions in FUNCTIONS.items():
        for path, parameters in functions.items():
            function = find(module, path, problems)
            if function is not None:
                have = inspect.signature(function).parameters
                absent = [name for name in parameters if name not in have]
                if absent:
                    problems.append(f"{module}.{path} has no parameter {', '.join(absent)}")
    for module, functions in ATTRIBUTES.items():
        for path, attributes in functions.items():
            function = find(module, path, problems)
            if function is not None:
                names = inspect.unwrap(function).__code__.co_names
                absent = [name for name in attributes if name not in names]
                if absent:
                    problems.append(f"{module}.{path} does not use {', '.join(absent)}")
    for name in LINEAR_CLASSES:
        apply = find("vllm.lora.layers", f"{name}.apply", problems)
        if apply is not None and list(inspect.signature(apply).parameters) != ["self", "x", "bias"]:
            problems.append(f"vllm.lora.layers.{name}.apply is not apply(self, x, bias)")
        find("vllm.lora.layers", f"{name}.create_lora_weights", problems)
    classes = find("vllm.lora.utils", "_all_lora_classes", problems)
    if classes is not None:
        absent = sorted(set(LINEAR_CLASSES) - {cls.__name__ for cls in classes})
        if absent:
            problems.append(f"vllm.lora.utils._all_lora_classes lacks {', '.join(absent)}")
    return problems


def find(module: str, path: str, problems: list[str]) -> Any:
    """Return the object at `path` in `module`; where it does not exist, add a problem and return None."""
    try:
        target: Any = importlib.import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        problems.append(f"{module}.{path} does not exist ({error})")
        return None
    return target


def native_dora() -> bool:
    """Return True when this vLLM accepts DoRA adapters without the plugin."""
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
