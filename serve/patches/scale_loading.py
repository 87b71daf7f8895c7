"""Loading of row scales from a served folder into the slots of vLLM's layers.

vLLM loads an adapter in four steps, and each is extended by a wrapper of the same signature:

    PEFTHelper.from_local_dir          adapter_config.json: a folder with row_scale.safetensors may state use_dora
    LoRAModel.from_local_checkpoint    tensors: the magnitudes are skipped, the row scales are read
    LoRAModelManager._add_adapter      all checks, before the adapter is registered
    LoRAModelManager.activate_adapter  the adapter's scales are copied to its slot, which is then tested

All checks are made before the registration, since vLLM does not check a registered adapter again: an adapter that was
refused later would be served without its scales.
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
    """Wrap the function of PEFTHelper.from_local_dir (`original`, a class method): accept DoRA with row scales."""

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        helper = original(cls, lora_path, *args, **kwargs)
        scaled = (Path(lora_path) / SCALE_FILE).is_file()
        if scaled and not helper.use_dora:
            raise ValueError(f"{lora_path} has a {SCALE_FILE} but its adapter_config.json states use_dora false")
        if scaled:
            helper.use_dora = False
            setattr(helper, _MARK, True)
        return helper

    return from_local_dir


def wrap_from_local_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function of LoRAModel.from_local_checkpoint (`original`, a class method): also read row scales."""

    def from_local_checkpoint(
        cls: Any, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **kwargs: Any
    ) -> Any:
        scaled = getattr(peft_helper, _MARK, False)
        mapper = kwargs.get("weights_mapper")
        if scaled:
            # vLLM skips tensors whose names contain one of these texts; it has no other way to skip magnitudes.
            kwargs["skip_prefixes"] = [*(kwargs.get("skip_prefixes") or []), MAGNITUDE]
        lora = original(cls, lora_dir, expected_lora_modules, peft_helper, **kwargs)
        if scaled:
            setattr(lora, _SCALES, _read_scales(Path(lora_dir), lora, mapper))
        if (Path(lora_dir) / MANIFEST).is_file():
            setattr(lora, _STRICT, lora_dir)
        return lora

    return from_local_checkpoint


def wrap_add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap LoRAModelManager._add_adapter (`original`), which packs q, k, v and registers: check the adapter first."""

    def _add_adapter(self: Any, lora: Any) -> Any:
        scales = getattr(lora, _SCALES, None)
        if scales is not None or hasattr(lora, _STRICT):
            refuse_unused(self, lora, count_stages())
        if scales is not None:
            setattr(lora, _SCALES, group_by_layer(self, scales, count_stages()))
        return original(self, lora)

    return _add_adapter


def wrap_activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap LoRAModelManager.activate_adapter (`original`): then copy the scales to the slot and test it."""

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
    """Return the row scales (out,) float32 by vLLM's names of the weights before packing.

    Raises ValueError where a scale has no factors, a magnitude has no scale, or a shape or value is wrong.
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
                problems.append(f"{key} has no lora_A and lora_B")
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


def refuse_unused(manager: Any, lora: Any, stages: int) -> None:
    """Raise ValueError for a weight of the adapter that no layer uses; vLLM would ignore it silently.

    stages: the number of pipeline stages, which hold different layers.
    """
    names = set(manager.modules) | {member for group in manager.packed_modules.values() for member in group}
    known_names = {spelling for name in names for spelling in _list_spellings(manager, name)}
    unused = sorted(set(lora.loras) - known_names)
    if unused and stages > 1:
        # The weight may belong to another stage: then some layer of this stage has a weight of the same name.
        patterns = {_replace_layer_number(name) for name in known_names}
        unused = [name for name in unused if _replace_layer_number(name) not in patterns]
    if unused:
        raise ValueError(
            f"no layer uses {len(unused)} of the adapter's weights ({', '.join(unused[:4])}"
            f"{', ...' if len(unused) > 4 else ''}): is --lora-target-modules too narrow, "
            "or is this another base?"
        )


def group_by_layer(manager: Any, scales: dict[str, Any], stages: int) -> dict[str, list[Any]]:
    """Return the scales by vLLM's layer, each a list in the order in which the layer packs its weights.

    stages: the number of pipeline stages; with one stage, scales without a layer raise ValueError.
    """
    layers: dict[str, list[Any]] = {}
    remaining = dict(scales)
    for name in manager.modules:
        members = manager.packed_modules.get(name, [name])
        members = [_find_spelling(remaining, manager, member) for member in members]
        packed_name = _find_spelling(remaining, manager, name)
        if not any(member in remaining for member in members) and packed_name in remaining:
            members = [packed_name]  # the adapter has one tensor for the packed layer
        values = [remaining.pop(member, None) for member in members]
        if any(value is not None for value in values):
            layers[name] = values
    stuck = [name for name in layers if not hasattr(manager.modules[name], "set_row_scale")]
    if stuck:
        raise ValueError(
            "row scales are supported on linear layers only, not on embeddings, lm_head or mixtures of "
            "experts: " + ", ".join(f"{name} ({type(manager.modules[name]).__name__})" for name in stuck)
        )
    if remaining and stages == 1:
        raise ValueError(f"no layer uses the row scales of {', '.join(sorted(remaining))}")
    return layers


def _list_spellings(manager: Any, name: str) -> list[str]:
    """Return the names that an adapter may use for vLLM's layer `name`, in the order in which vLLM tries them.

    Source: LoRAModelManager._get_lora_layer_weights. Pooling models also try the name without `model.`; from 0.33 on,
    multimodal models also try the text model's own names.
    """
    pooling = [name.removeprefix("model.")] if getattr(manager, "is_pooling_model", False) else []
    text_names = getattr(manager, "_get_text_lora_names", None)
    return [name, *pooling, *(text_names(name) if text_names is not None else [])]


def _find_spelling(scales: dict[str, Any], manager: Any, name: str) -> str:
    """Return the first spelling of `name` that is a key of `scales`; `name` itself where there is none."""
    return next((spelling for spelling in _list_spellings(manager, name) if spelling in scales), name)


def _replace_layer_number(name: str) -> str:
    """Return the name with * for the layer's number."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def count_stages() -> int:
    """Return the number of pipeline stages."""
    from vllm.distributed.parallel_state import get_pp_group

    return int(get_pp_group().world_size)
