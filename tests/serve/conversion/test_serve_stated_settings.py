"""What an adapter's files do not say: in options and in read_options.json, part of what names the served folder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import World

from adapter_merge.errors import AdapterMergeError, InputError
from adapter_merge.serve.api_server.adapter_loader import LOOK_SECONDS, Source
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter, Served, inside
from adapter_merge.serve.conversion.stated_settings import FILE, Stated, check_settings, read_settings_beside


@pytest.fixture
def converter(qwen2: World, tmp_path: Path) -> Converter:
    return Converter(qwen2.base, Cache(tmp_path / "cache"))


def without(world: World, kind: str, folder: Path, *keys: str, **config: Any) -> Path:
    """The raw adapter `kind`, with keys of its config lost or changed."""
    shutil.copytree(world.adapters[kind].raw, folder)
    file = folder / "adapter_config.json"
    content = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))
    return folder


def served_weight(world: World, served: Served, name: str) -> Tensor:
    """W0 + B A of a plain served folder, float64."""
    tensors = load_file(served.folder / "adapter_model.safetensors")
    key = "base_model.model." + name.removesuffix(".weight")
    return world.oracle.weights[name] + (
        tensors[key + ".lora_B.weight"].double() @ tensors[key + ".lora_A.weight"].double()
    )


def test_a_lost_alpha(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """Refused without, exact with; another alpha is another folder; the option wins over the file."""
    raw = without(qwen2, "dcft-1", tmp_path / "adapter", "lora_alpha")
    with pytest.raises(AdapterMergeError, match="lora_alpha"):
        converter.obtain(raw)
    served = converter.obtain(raw, check_settings({"alpha": 32}))
    for name, merged in qwen2.adapters["dcft-1"].merged.items():
        torch.testing.assert_close(served_weight(qwen2, served, name), merged, rtol=1e-5, atol=1e-6)
    other = converter.obtain(raw, check_settings({"alpha": 16}))
    assert other.folder != served.folder
    name = "model.layers.0.mlp.up_proj.weight"
    base = qwen2.oracle.weights[name]
    half = base + (qwen2.adapters["dcft-1"].merged[name] - base) / 2
    torch.testing.assert_close(served_weight(qwen2, other, name), half, rtol=1e-5, atol=1e-6)
    (raw / FILE).write_text(json.dumps({"alpha": 16}))
    assert converter.obtain(raw).folder == other.folder
    assert converter.obtain(raw, check_settings({"alpha": 32.0})).folder == served.folder


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_decomposed_base_doubles_the_rank(qwen2: World, converter: Converter, tmp_path: Path, init: str) -> None:
    """The rank that a server is started with is the one that the factors have."""
    folder = tmp_path / init
    shutil.copytree(qwen2.adapters["lora-1"].raw, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    stated = check_settings({"base_kind": "original", "force": True})  # no factors of this base
    outline = converter.outline(folder, stated)
    assert outline.rank == 2 * converter.outline(qwen2.adapters["lora-1"].raw).rank
    assert converter.obtain(folder, stated).rank == outline.rank
    assert converter.outline(folder, check_settings({"base_kind": "residual"})).rank == outline.rank // 2


def test_the_adapter_before_training(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """CorDA on the original base: W0 + s (B A - B0 A0), at twice the rank; the first factors belong to the key."""
    generator = torch.Generator().manual_seed(4)
    name, s = "model.layers.1.self_attn.q_proj", 16 / 8
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    factors = [torch.randn(shape, generator=generator) * 0.1 for shape in ((8, 256), (256, 8), (8, 256), (256, 8))]
    folders = tmp_path / "trained", tmp_path / "trained" / "before"
    for folder, (a, b) in zip(folders, (factors[:2], factors[2:]), strict=True):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "corda"}))
        key = f"base_model.model.{name}"
        save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folders[0] / FILE).write_text(json.dumps({"init_adapter": "before", "base_kind": "original"}))
    a, b, a0, b0 = (factor.double() for factor in factors)
    served = converter.obtain(folders[0])
    assert converter.outline(folders[0]).rank == 16
    expected = qwen2.oracle.weights[name + ".weight"] + s * (b @ a - b0 @ a0)
    torch.testing.assert_close(served_weight(qwen2, served, name + ".weight"), expected, rtol=1e-5, atol=1e-5)
    seen = Source.at(folders[0])
    assert seen.is_unchanged()
    file = folders[1] / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    time.sleep(LOOK_SECONDS)
    assert not seen.is_unchanged(), "what is read beside the adapter is watched too"
    assert converter.obtain(folders[0]).folder != served.folder


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"alfa": 1}', "alfa"),
        ('{"alpha": "32"}', "alpha is wrong"),
        ('{"alpha": true}', "alpha is wrong"),
        ('{"alpha": NaN}', "alpha is wrong"),
        ('{"format": "zip"}', "format is wrong"),
        ('{"base_kind": 1}', "base_kind is wrong"),
        ('{"init_adapter": "../outside"}', "not in the adapter's folder"),
        ('{"init_adapter": "/etc"}', "not in the adapter's folder"),
        ('{"init_adapter": "link"}', "not in the adapter's folder"),
        ('{"init_adapter": "linked"}', "not in the adapter's folder"),
        ('{"magnitudes": "missing"}', "not in the adapter's folder"),
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, word: str) -> None:
    adapter, outside = tmp_path / "adapters" / "adapter", tmp_path / "outside"
    (adapter / "linked").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("")
    (adapter / "link").symlink_to(outside)
    (adapter / "linked" / "file").symlink_to(outside / "secret")
    (adapter / FILE).write_text(content)
    with pytest.raises(AdapterMergeError, match=word):
        read_settings_beside(adapter)
    with pytest.raises(InputError, match="a link that leaves"):
        inside(tmp_path / "adapters", "adapter")


def test_every_problem_of_a_file_at_once() -> None:
    with pytest.raises(InputError) as caught:
        check_settings({"alpha": "x", "prefix": 3, "nothing": 1})
    assert len(caught.value.problems) == 3
    assert check_settings({}) == Stated()


def test_a_single_file(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """kohya's form of a LoRA is one file: served as it is."""
    tensors = load_file(qwen2.adapters["lora-1"].raw / "adapter_model.safetensors")
    flat: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        name = "lycoris_" + module.replace(".", "_")
        flat[f"{name}.lora_{'down' if rest.startswith('A') else 'up'}.weight"] = tensor
        flat[f"{name}.alpha"] = torch.tensor(16.0)
    file = tmp_path / "style.safetensors"
    save_file(flat, file)
    served = converter.obtain(file)
    for name, merged in qwen2.adapters["lora-1"].merged.items():
        torch.testing.assert_close(served_weight(qwen2, served, name), merged, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_one_file_is_looked_at_with_every_request(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    seen = Source.at(file)
    assert seen.is_unchanged()
    save_file({"a": torch.ones(3)}, file)
    assert not seen.is_unchanged()
