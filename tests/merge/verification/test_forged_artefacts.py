"""Artefacts that were changed by hand so that a loader computes something else: verify fails on the weights alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factor_models import peft_adapter, pico_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify

Edit = Callable[[Path], None]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("forged")
    base = pico_model(place / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_pico.Pico"}}
    (base / "config.json").write_text(json.dumps(config | code), "utf-8")
    (base / "modeling_pico.py").write_text("pass", "utf-8")
    peft_adapter(base, place / "adapter", update=0.2)
    merge(base, place / "adapter", place / "merged", MergeOptions(device="cpu"))
    factor(base, place / "adapter", place / "factors")
    factor(base, place / "adapter", place / "truncated", FactorOptions(rank=2))
    return place


def setting(file: str, **values: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps(content | values), "utf-8")

    return edit


def tensors(file: str, change: Callable[[dict[str, Tensor]], None]) -> Edit:
    def edit(folder: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file(content, folder / file, {"format": "pt"})

    return edit


def add_base_layer(content: dict[str, Tensor]) -> None:
    """PEFT loads it in place of the base's weight."""
    name = next(name for name in content if name.endswith("q_proj.lora_A.weight"))
    side = content[name].shape[1]
    content[name.replace("lora_A", "base_layer")] = torch.randn(side, side)


def halve_a_norm(content: dict[str, Tensor]) -> None:
    content["model.norm.weight"] = content["model.norm.weight"].half()


def weights_beside(folder: Path) -> None:
    """vLLM reads every safetensors file of a folder without an index."""
    content = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in content.items()}, folder / "model-2.safetensors")


FACTOR_EDITS: dict[str, tuple[Edit, str]] = {
    "excluded": (setting("adapter_config.json", exclude_modules=["q_proj"]), "does not adapt"),
    "one layer": (setting("adapter_config.json", layers_to_transform=[0]), "does not adapt"),
    "other targets": (setting("adapter_config.json", target_modules=["v_proj"]), "does not adapt"),
    "a base layer": (tensors(WEIGHTS, add_base_layer), "saved layers of the base"),
}
MERGED_EDITS: dict[str, tuple[Edit, str]] = {
    "dtype": (setting("config.json", dtype="float16"), "states 'float16'"),
    "half a tensor": (tensors("model.safetensors", halve_a_norm), "several dtypes"),
    "weights beside": (weights_beside, "no index names"),
    "code": (lambda folder: (folder / "modeling_pico.py").write_text("import os", "utf-8") and None, "code is not"),  # type: ignore[return-value]
}


@pytest.mark.parametrize("artefact", ["factors", "truncated"])
@pytest.mark.parametrize("name", FACTOR_EDITS)
def test_edited_factors_fail(name: str, artefact: str, made: Path, tmp_path: Path) -> None:
    check_edited(*FACTOR_EDITS[name], made, artefact, tmp_path)


@pytest.mark.parametrize("name", MERGED_EDITS)
def test_edited_models_fail(name: str, made: Path, tmp_path: Path) -> None:
    check_edited(*MERGED_EDITS[name], made, "merged", tmp_path)


def check_edited(edit: Edit, words: str, made: Path, artefact: str, place: Path) -> None:
    copy = shutil.copytree(made / artefact, place / "copy")
    options = VerifyOptions(weights_only=True)
    assert verify(made / "base", made / "adapter", copy, options).passed
    edit(copy)
    report = verify(made / "base", made / "adapter", copy, options)
    assert any(words in problem for problem in report.problems), report.problems


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("artefact", ["factors", "truncated"])
def test_a_stated_calibration_covers_no_lost_directions(kept: int, artefact: str, made: Path, tmp_path: Path) -> None:
    """The largest directions alone are a projection and hold most of dW; the manifest states any error."""
    copy = shutil.copytree(made / artefact, tmp_path / "copy")
    content = load_file(copy / WEIGHTS)
    for name in [name for name in content if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        u, s, v = torch.linalg.svd((content[other] @ content[name]).double(), full_matrices=False)
        rank = len(content[name])
        s[kept:] = 0
        content[name] = v[:rank].float().contiguous()
        content[other] = (u[:, :rank] * s[:rank]).float().contiguous()
    save_file(content, copy / WEIGHTS, {"format": "pt"})
    manifest = json.loads((copy / "adapter_merge.json").read_text("utf-8"))
    manifest["calibration"] = {"file": "text.txt", "sha256": "0" * 64, "tokens": 100, "shrinkage": 0.01}
    for figures in manifest["layers"].values():
        figures["relative_error"] = 1.0
    (copy / "adapter_merge.json").write_text(json.dumps(manifest), "utf-8")
    report = verify(made / "base", made / "adapter", copy, VerifyOptions(weights_only=True))
    if artefact == "truncated" and kept == 2:  # the best of its rank
        assert report.passed, report.problems
        assert any("was not checked" in note for note in report.as_json()["notes"])
    else:
        assert not report.passed
