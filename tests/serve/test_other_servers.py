"""What SGLang, LoRAX and TGI read of an adapter folder, redone from their sources: plain served folders have it.

None of the three runs here (they need a GPU). Each scales by lora_alpha / r of the config alone, whatever
rank_pattern says; LoRAX and TGI look tensors up by PEFT's full name and stack one kind of layer over the whole model,
so that an adapter on some layers only, or of several ranks, is not for them. LoRAX, TGI and older SGLang do not look
at use_dora.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from world import World

from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter


@pytest.mark.parametrize("name", ["lora-1", "lora-2", "dcft-1", "dcft-2"])
def test_plain_folders_have_what_other_servers_read(qwen2: World, tmp_path: Path, name: str) -> None:
    folder = Converter(qwen2.base, Cache(tmp_path)).obtain(qwen2.adapters[name].raw).folder
    config = json.loads((folder / "adapter_config.json").read_text())
    # SGLang: these keys, a list of last names, and layers.N. in the names of the tensors
    assert config["peft_type"].lower() == "lora"
    assert isinstance(config["target_modules"], list)
    assert not config.get("use_dora")
    # LoRAX and TGI: PEFT's own reader
    import peft

    read = peft.LoraConfig.from_pretrained(str(folder))
    scale = read.lora_alpha / (read.r**0.5 if read.use_rslora else read.r)
    assert scale == config["lora_alpha"] / config["r"] == 1

    tensors = load_file(folder / "adapter_model.safetensors")
    ranks: dict[str, list[int]] = defaultdict(list)
    used = set()
    for weight in qwen2.oracle.weights:
        module = weight.removesuffix(".weight")
        keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        if not set(keys) <= tensors.keys():
            assert weight not in qwen2.adapters[name].merged
            continue
        used |= set(keys)
        a, b = (tensors[key].double() for key in keys)
        ranks[module.rsplit(".", 1)[1]].append(a.shape[0])
        torch.testing.assert_close(
            qwen2.oracle.weights[weight] + scale * b @ a, qwen2.adapters[name].merged[weight], rtol=1e-5, atol=1e-6
        )
    assert used == set(tensors), "nothing is left over"
    assert set(ranks) == set(config["target_modules"])
    assert all(len(found) == 2 and len(set(found)) == 1 for found in ranks.values()), "stackable over the layers"


def test_scaled_folders_say_what_they_are(qwen2: World, tmp_path: Path) -> None:
    """Nothing but use_dora and a tensor of another name tells such servers; README warns of them."""
    folder = Converter(qwen2.base, Cache(tmp_path)).obtain(qwen2.adapters["dude-1"].raw).folder
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    assert any(key.endswith("lora_magnitude_vector") for key in load_file(folder / "adapter_model.safetensors"))
