"""Damaged quantised bases of every scheme: each refusal names the tensor or the key, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_bases
import pytest
from quantised_bases import config_of, quantised
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.errors import AdapterMergeError
from adapter_merge.quantisation.dense_view import open_base

LAYER = "model.layers.1.mlp.down_proj"
EXPERTS = "model.layers.1.mlp.experts.down_proj"
SCALES = {"gptq": ".scales", "awq": ".scales", "nf4": ".weight.absmax", "int8": ".SCB", "gpt-oss": "_scales"}
PACKS = {"gptq": ".qweight", "awq": ".qweight", "gpt-oss": "_blocks", "W4A16": ".weight_packed",
         "NVFP4A16": ".weight_packed", "MXFP4A16": ".weight_packed"}  # fmt: skip
KINDS = ("gptq", "awq", "gpt-oss", "W4A16", "NVFP4A16", "MXFP4A16", "INT8", "FP8_BLOCK", "nf4", "int8")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("base") / kind
            if kind == "gpt-oss":
                packed_bases.gpt_oss_base(folder)
            elif kind in packed_bases.KINDS:
                packed_bases.packed_base(kind, folder)
            else:
                quantised(kind, folder, 256)
            made[kind] = folder
        return made[kind]

    return make


def damaged(base: Path, folder: Path, ending: str, change: Callable[[Tensor], Tensor | None]) -> str:
    """A copy of the base in which one tensor of the last layer is changed, or left out; its name."""
    shutil.copytree(base, folder)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in list(tensors):
            if name in (LAYER + ending, EXPERTS + ending):
                value = change(tensors.pop(name))
                if value is not None:
                    tensors[name] = value
                save_file(tensors, file, {"format": "pt"})
                index = folder / "model.safetensors.index.json"
                if value is None and index.is_file():
                    content = json.loads(index.read_text())
                    del content["weight_map"][name]
                    index.write_text(json.dumps(content))
                return name
    raise AssertionError(f"no tensor ends in {ending}")


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterMergeError) as raised:
        open_base(folder)
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_scale_is_named(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    name = damaged(bases(kind), tmp_path / "base", SCALES.get(kind, ".weight_scale"), lambda _: None)
    text = refusal(tmp_path / "base")
    assert (EXPERTS if kind == "gpt-oss" else LAYER) in text, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_pack_is_named(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A row less than the scales, the zero points or the stated shape need; of FP8 in blocks, a row of blocks less."""
    rows = 128 if kind == "FP8_BLOCK" else 1
    damaged(bases(kind), tmp_path / "base", PACKS.get(kind, ".weight"), lambda pack: pack[:-rows].clone())
    assert (EXPERTS if kind == "gpt-oss" else LAYER) in refusal(tmp_path / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_another_shape_is_named(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    ending = SCALES.get(kind, ".weight_scale")
    name = damaged(bases(kind), tmp_path / "base", ending, lambda scale: scale.repeat_interleave(2, 0))
    assert name in refusal(tmp_path / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_of_the_config_is_named(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bases(kind), tmp_path / "base")
    config = config_of(tmp_path / "base")
    config["quantization_config"]["rotated_by"] = 2
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "rotated_by" in refusal(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("gptq", {"group_size": 64}, LAYER),
        ("gptq", {"bits": 8}, LAYER),
        ("gptq", {"bits": 3}, "bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format"),
        ("awq", {"group_size": 16}, LAYER),
        ("awq", {"version": "gemv"}, "version"),
        ("FP8_BLOCK", {"format": "pack-quantized"}, "pack-quantized"),
        ("W4A16", {"quantization_status": "initialized"}, "quantization_status"),
        ("nf4", {"quant_method": "fp8"}, "load_in_4bit"),
        ("gpt-oss", {"quant_method": "aqlm"}, "aqlm"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    kind: str, changes: dict[str, Any], names: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(bases(kind), tmp_path / "base")
    config = config_of(tmp_path / "base")
    config["quantization_config"] |= changes
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert names in refusal(tmp_path / "base")


@pytest.mark.parametrize("kind", ["W4A16", "NVFP4A16", "MXFP4A16", "INT8", "FP8_BLOCK"])
def test_another_group_size_is_named(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bases(kind), tmp_path / "base")
    config = config_of(tmp_path / "base")
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights |= {"block_structure": [64, 64]} if kind == "FP8_BLOCK" else {"strategy": "group", "group_size": 8}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    text = refusal(tmp_path / "base")
    assert LAYER in text or "model.layers" in text or "group_size" in text
