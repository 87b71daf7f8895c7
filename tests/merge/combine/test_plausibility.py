"""Warnings of inputs that are possible, but seldom meant: said by name, by inspect and by the merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_models import base_tensors, write_base, write_lora
from safetensors.torch import load_file, save_file

from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.errors import NumericsError


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(layers=6)
    return write_base(tmp_path / "base", tensors, 1), write_lora(tmp_path / "adapter", tensors, scale=0.01)


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_nothing_is_said_of_a_usual_adapter(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    assert inspect(pair[1], pair[0]).warnings == ()
    assert merge(*pair, tmp_path / "out").warnings == ()


def test_layers_that_the_files_leave_out(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    gone = ("layers.3.q_proj", "layers.5.up_proj")
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if not any(part in name for part in gone)}, file
    )
    for warnings in (inspect(adapter, base).warnings, merge(base, adapter, tmp_path / "out").warnings):
        (warning,) = warnings
        assert "2 of 24 weights" in warning and all(f"model.{part}" in warning for part in gone)
    for chosen in ({"layers_to_transform": [0, 1]}, {"target_modules": r".*_proj"}):
        change(adapter / "adapter_config.json", **chosen)
        assert inspect(adapter, base).warnings == ()


@pytest.mark.parametrize("how", ["alpha", "values"])
def test_changes_larger_than_the_weights(how: str, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    if how == "alpha":
        change(adapter / "adapter_config.json", lora_alpha=80_000)
    else:
        file = adapter / "adapter_model.safetensors"
        save_file({name: tensor * 1e18 for name, tensor in load_file(file).items()}, file)
    told = [inspect(adapter, base), merge(base, adapter, tmp_path / "dry", MergeOptions(dry_run=True))]
    told.append(merge(base, adapter, tmp_path / "out", MergeOptions(dtype="float32")))
    for result in told:
        assert "times as large as the weight itself" in result.warnings[0], result.warnings


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_of_the_base_that_are_none(dtype: torch.dtype, shift: int, value: float, tmp_path: Path) -> None:
    """At any place: in weights larger than a step of the copy, and in a file whose tensors are not aligned."""
    tensors = {name: tensor.to(dtype) for name, tensor in base_tensors(layers=1).items() if tensor.is_floating_point()}
    adapter = write_lora(tmp_path / "adapter", tensors)
    torch.manual_seed(0)
    for number, place in enumerate((0, 399_998, 399_999, 200_001)):
        wide = torch.randn(400_000).to(dtype)
        wide[place] = value
        tensors[f"bad.{number}"] = wide
    tensors["good"] = torch.full((400_000,), torch.finfo(dtype).max, dtype=dtype)
    base = write_base(tmp_path / "base", tensors, 1)
    if shift:  # other writers do not align their headers
        data = (base / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        prefix = (length + 1).to_bytes(8, "little")
        (base / "model.safetensors").write_bytes(prefix + data[8 : 8 + length] + b" " + data[8 + length :])
    for link in ("copy", "hardlink"):
        (warning,) = merge(base, adapter, tmp_path / link, MergeOptions(link=link)).warnings
        assert "NaN or infinity in 4 weights" in warning and "bad.0, bad.1, bad.2, bad.3" in warning
    assert json.loads((tmp_path / "copy" / "adapter_merge.json").read_text())["warnings"] == [warning]


def test_a_linked_shard_is_looked_at_too(tmp_path: Path) -> None:
    tensors = base_tensors(layers=1)
    base = write_base(tmp_path / "base", tensors, 2)
    name = min(key for key in load_file(base / "model-00002-of-00002.safetensors") if key.endswith("norm.weight"))
    adapter = write_lora(tmp_path / "adapter", {key: value for key, value in tensors.items() if "q_proj" in key})
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name][0] = float("nan")
            save_file(held, file)
    (warning,) = merge(base, adapter, tmp_path / "out", MergeOptions(link="hardlink")).warnings
    assert name in warning


def test_an_adapted_weight_is_refused_by_the_bases_name(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    held = load_file(base / "model.safetensors")
    held["model.layers.2.k_proj.weight"][3, 5] = float("inf")
    save_file(held, base / "model.safetensors")
    with pytest.raises(NumericsError, match=r"base's own model\.layers\.2\.k_proj\.weight holds NaN or infinity"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
