"""Row scales of DoRA on a bitsandbytes base: those of PEFT's own DoRA beside bitsandbytes' live layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.integrations import dequantize_module_weight
from pico_bases import quiet
from quantised_bases import quantised
from safetensors.torch import load_file

from adapter_merge.api.factor import factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_row_scales_are_magnitudes_over_pefts_norms(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = quantised(kind, tmp_path / "base", 128, dtype)
    with quiet():
        loaded: Any = transformers.LlamaForCausalLM.from_pretrained(base, device_map="cpu")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True)
        live = peft.get_peft_model(loaded, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in live.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    value.normal_(0, 0.05, generator=generator)
                elif "magnitude" in name:
                    value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
        live.save_pretrained(tmp_path / "adapter")
    factor(base, tmp_path / "adapter", tmp_path / "factors")
    scales = load_file(tmp_path / "factors" / "row_scale.safetensors")
    assert len(scales) == 4
    for name, found in scales.items():
        layer: Any = live.get_submodule(name.removesuffix(".row_scale"))
        dora = layer.lora_magnitude_vector["default"]
        change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = dequantize_module_weight(layer.get_base_layer()).to(change.dtype)
        norms = dora.get_weight_norm(weight, change, layer.scaling["default"])
        wanted = (dora.weight.double() / norms.double()).detach()
        assert float(wanted.max() - wanted.min()) > 0.1
        assert float((found.double().flatten() / wanted - 1).abs().max()) <= 1e-6, name
