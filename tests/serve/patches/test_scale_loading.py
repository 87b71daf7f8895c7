"""Names under which scales reach vLLM's layers, on managers as vLLM builds them for its kinds of models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapter_merge.serve.patches import scale_loading


class Layer:
    """As much of a layer as is asked for here."""

    def set_row_scale(self, index: int, scales: Any) -> None: ...


def manager(prefix: str, **more: Any) -> Any:
    """One layer with q, k and v packed, and one alone."""
    attention, down = f"{prefix}layers.0.self_attn.", f"{prefix}layers.0.mlp.down_proj"
    packed = {f"{attention}qkv_proj": [f"{attention}{part}_proj" for part in "qkv"]}
    return SimpleNamespace(modules={f"{attention}qkv_proj": Layer(), down: Layer()}, packed_modules=packed, **more)


def text_names(name: str) -> list[str]:
    """LoRAModelManager._get_text_lora_names of vLLM 0.33 for a decoder that is mounted as language_model.model."""
    start = "language_model."
    return [name.removeprefix(start)] if name.startswith(start) else []


KINDS = {
    "text": ("model.", {}, "model."),
    "pooling": ("model.", {"is_pooling_model": True}, ""),
    "multimodal, its own names": (
        "language_model.model.",
        {"_get_text_lora_names": text_names},
        "language_model.model.",
    ),
    "multimodal, the text model's names": ("language_model.model.", {"_get_text_lora_names": text_names}, "model."),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_finds_its_layer(kind: str) -> None:
    mounted, more, given = KINDS[kind]
    scales = {f"{given}layers.0.{name}_proj": torch.full((2,), float(number))
              for number, name in enumerate(("self_attn.q", "self_attn.v", "mlp.down"))}  # fmt: skip
    held = manager(mounted, **more)
    scale_loading.refuse_unused(held, SimpleNamespace(loras=scales), stages=1)
    found = scale_loading.group_by_layer(held, scales, stages=1)
    values = {name: [None if value is None else float(value[0]) for value in parts] for name, parts in found.items()}
    layer = f"{mounted}layers.0."
    assert values == {f"{layer}self_attn.qkv_proj": [0.0, None, 1.0], f"{layer}mlp.down_proj": [2.0]}


def test_names_of_no_layer_are_refused() -> None:
    """The text model's names in a vLLM that does not know them (up to 0.32), and a stranger's."""
    for held, name in ((manager("language_model.model."), "model."), (manager("model."), "encoder.")):
        scales = {f"{name}layers.0.mlp.down_proj": torch.ones(2)}
        with pytest.raises(ValueError, match="no layer uses 1 of the adapter's weights"):
            scale_loading.refuse_unused(held, SimpleNamespace(loras=scales), stages=1)
        with pytest.raises(ValueError, match="no layer uses the row scales"):
            scale_loading.group_by_layer(held, scales, stages=1)


class Step5FusedQKVIndexerWithLoRA:
    """A class of vLLM 0.33 that is none of the linear ones: it has no place for scales."""


def test_scales_of_other_classes_of_layers_are_refused() -> None:
    held = manager("model.")
    name = "model.layers.0.self_attn.qkv_proj"
    held.modules[name] = Step5FusedQKVIndexerWithLoRA()
    scales = {"model.layers.0.self_attn.q_proj": torch.ones(2)}
    scale_loading.refuse_unused(held, SimpleNamespace(loras=scales), stages=1)
    with pytest.raises(ValueError, match=r"on linear layers only.*qkv_proj \(Step5FusedQKVIndexerWithLoRA\)"):
        scale_loading.group_by_layer(held, scales, stages=1)
