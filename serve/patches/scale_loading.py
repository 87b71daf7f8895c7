"""Loading of row scales from a served folder into the slots of vLLM's layers.

vLLM loads an adapter in three steps, and each is extended by a wrapper of the same signature:

    PEFTHelper.from_local_dir        adapter_config.json: a folder with row_scale.safetensors may say use_dora
    LoRAModel.from_local_checkpoint  tensors: the magnitudes are skipped, the row scales read
    LoRAModelManager._add_adapter    everything is checked before the adapter is registered
    LoRAModelManager.activate_adapter  the scales of the adapter go to its slot, which is then tested

Every check stands before the registration, for an adapter that is registered is never checked again: whatever
is refused later would be served without its scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import slot_check

SCALE_FILE = "row_scale.safetensors"
SCALE_SUFFIX = ".row_scale"
MAGNITUDE = "lora_magnitude_vector"
MANIFEST = "adapter_merge.json"

_MARK = "_adapter_merge_scaled"
_SCALES = "_adapter_merge_scales"
_STRICT = "_adapter_merge_strict"


def wrap_from_local_dir(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is the function under PEFTHelper.from_local_dir (a class method)."""

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        helper = original(cls, lora_path, *args, **kwargs)
        scaled = (Path(lora_path) / SCALE_FILE).is_file()
        if scaled and not helper.use_dora:
            raise ValueError(f"{lora_path} has a {SCALE_FILE} but its adapter_config.json says use_dora false")
        if scaled:
            helper.use_dora = False
            setattr(helper, _MARK, True)
        return helper

    return from_local_dir


def wrap_from_local_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is the function under LoRAModel.from_local_checkpoint (a class method)."""

    def from_local_checkpoint(
        cls: Any, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **kwargs: Any
    ) -> Any:
        scaled = getattr(peft_helper, _MARK, False)
        mapper = kwargs.get("weights_mapper")
        if scaled:
            # vLLM leaves out tensors by part of their name here; it knows no key for magnitudes.
            kwargs["skip_prefixes"] = [*(kwargs.get("skip_prefixes") or []), MAGNITUDE]
        lora = original(cls, lora_dir, expected_lora_modules, peft_helper, **kwargs)
        if scaled:
            setattr(lora, _SCALES, _read_scales(Path(lora_dir), lora, mapper))
        if (Path(lora_dir) / MANIFEST).is_file():
            setattr(lora, _STRICT, lora_dir)
        return lora

    return from_local_checkpoint


def wrap_add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is LoRAModelManager._add_adapter, which packs q, k, v and registers the adapter."""

    def _add_adapter(self: Any, lora: Any) -> Any:
        scales = getattr(lora, _SCALES, None)
        if scales is not None or hasattr(lora, _STRICT):
            _refuse_unused(self, lora)
        if scales is not None:
            setattr(lora, _SCALES, _per_layer(self, scales))
        return original(self, lora)

    return _add_adapter


def wrap_activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is LoRAModelManager.activate_adapter; it leaves the slot's scales at one."""

    def activate_adapter(self: Any, lora_id: int) -> Any:
        activated = original(self, lora_id)
        scales = getattr(self._registered_adapters[lora_id], _SCALES, None) if activated else None
        if scales:
            slot = self.lora_index_to_id.index(lora_id)
            try:
                for name, members in scales.items():
                    self.modules[name].set_row_scale(slot, members)
                slot_check.check_slot(self, lora_id, scales)
            except BaseException:
                self.remove_adapter(lora_id)
                raise
        return activated

    return activate_adapter


def _read_scales(folder: Path, lora: Any, mapper: Any) -> dict[str, Any]:
    """vLLM's name of each scaled weight (before packing) -> its row scale (out,) float32.

    Raises ValueError when a scale has no factors, a magnitude has no scale, or a shape or value is wrong.
    """
    import torch
    from safetensors import safe_open
    from vllm.lora.utils import parse_fine_tuned_lora_name

    scales: dict[str, Any] = {}
    problems = []
    with safe_open(str(folder / SCALE_FILE), framework="pt") as file:
        keys = list(file.keys())
        for key in keys:
            if not key.endswith(SCALE_SUFFIX):
                problems.append(f"unknown tensor {key}")
                continue
            name, _ = parse_fine_tuned_lora_name(key.removesuffix(SCALE_SUFFIX) + ".lora_A.weight", mapper)
            weights = lora.get_lora(name)
            scale = file.get_tensor(key)
            if weights is None or weights.lora_b is None:
                problems.append(f"{key} has no lora_A and lora_B beside it")
            elif scale.shape != (weights.lora_b.shape[0],):
                problems.append(f"{key}: expected ({weights.lora_b.shape[0]},), got {tuple(scale.shape)}")
            elif scale.dtype != torch.float32:
                problems.append(f"{key}: expected float32, got {scale.dtype}")
            elif not bool(torch.isfinite(scale).all()):
                problems.append(f"{key}: NaN or infinity")
            else:
                scales[name] = scale
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        scaled = {key.removesuffix(SCALE_SUFFIX) for key in keys}
        magnitudes = [key for key in file.keys() if key.endswith("." + MAGNITUDE)]  # noqa: SIM118
    problems += [f"{key} has no row scale" for key in magnitudes if key[: -len(MAGNITUDE) - 1] not in scaled]
    if problems:
        raise ValueError(f"{folder} cannot be served: " + "; ".join(problems))
    return scales


def _refuse_unused(manager: Any, lora: Any) -> None:
    """ValueError when a weight of the adapter would reach no layer: vLLM ignores such weights silently."""
    names = set(manager.modules) | {member for group in manager.packed_modules.values() for member in group}
    known = {spelling for name in names for spelling in _spellings(manager, name)}
    unused = sorted(set(lora.loras) - known)
    if unused and _pipeline_size() > 1:
        # Layers of the other stages: the same weight in some layer of this stage must be known.
        patterns = {_any_layer(name) for name in known}
        unused = [name for name in unused if _any_layer(name) not in patterns]
    if unused:
        raise ValueError(
            f"no layer takes {len(unused)} of the adapter's weights ({', '.join(unused[:4])}"
            f"{', ...' if len(unused) > 4 else ''}): is --lora-target-modules too narrow, "
            "or the base another one?"
        )


def _per_layer(manager: Any, scales: dict[str, Any]) -> dict[str, list[Any]]:
    """Scales by weight -> scales by vLLM's layer, in the order in which the layer packs its weights."""
    layers: dict[str, list[Any]] = {}
    left = dict(scales)
    for name in manager.modules:
        members = manager.packed_modules.get(name, [name])
        members = [_spelling_in(left, manager, member) for member in members]
        whole = _spelling_in(left, manager, name)
        if not any(member in left for member in members) and whole in left:
            members = [whole]  # one tensor for a layer that vLLM could also load in parts
        values = [left.pop(member, None) for member in members]
        if any(value is not None for value in values):
            layers[name] = values
    stuck = [name for name in layers if not hasattr(manager.modules[name], "set_row_scale")]
    if stuck:
        raise ValueError(
            "row scales are supported on linear layers only, not on embeddings, lm_head or mixtures of "
            "experts: " + ", ".join(f"{name} ({type(manager.modules[name]).__name__})" for name in stuck)
        )
    if left and _pipeline_size() == 1:
        raise ValueError(f"no layer takes the row scales of {', '.join(sorted(left))}")
    return layers


def _spellings(manager: Any, name: str) -> list[str]:
    """What an adapter may call vLLM's layer `name`, in the order in which vLLM tries it.

    LoRAModelManager._get_lora_layer_weights: without `model.` in pooling models, and from 0.33 on the text model's own
    names in a multimodal one.
    """
    pooling = [name.removeprefix("model.")] if getattr(manager, "is_pooling_model", False) else []
    text_names = getattr(manager, "_get_text_lora_names", None)
    return [name, *pooling, *(text_names(name) if text_names is not None else [])]


def _spelling_in(left: dict[str, Any], manager: Any, name: str) -> str:
    return next((spelling for spelling in _spellings(manager, name) if spelling in left), name)


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _pipeline_size() -> int:
    from vllm.distributed.parallel_state import get_pp_group

    return int(get_pp_group().world_size)
