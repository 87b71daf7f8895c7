"""A PEFT config against the tensors beside it: what PEFT would leave out or miss when it loads the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from pico_bases import llama, train

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import AdapterError, AdapterMergeError
from adapter_merge.formats.peft.targeting import adapts
from adapter_merge.formats.stated_settings import ReadOptions

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "model.layers.11.mlp.down_proj",
    "model.vision.blocks.1.attn.q_proj",
    "q_proj",
    "model.layers.1.self_attn.iq_proj",
    "lm_head",
    "score.head",
)
CONFIGS: tuple[dict[str, Any], ...] = (
    {"target_modules": TARGETS},
    {"target_modules": [*TARGETS, "lm_head", "head"], "modules_to_save": ["score"]},
    {"target_modules": r".*layers\.1\.(self_attn\.(q|k)_proj|mlp\..*)"},
    {"target_modules": TARGETS, "exclude_modules": ["1.self_attn.q_proj"]},
    {"target_modules": TARGETS, "exclude_modules": r".*\.vision\..*"},
    {"target_modules": TARGETS, "layers_to_transform": 1},
    {"target_modules": TARGETS, "layers_to_transform": [0, 11], "layers_pattern": "layers"},
    {"target_modules": TARGETS, "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_the_modules_of_a_config_are_those_of_peft(settings: dict[str, Any]) -> None:
    config = LoraConfig(**settings)
    expected = {name: bool(check_target_module_exists(config, name)) for name in NAMES}
    assert {name: adapts(settings, name) for name in NAMES} == expected
    assert any(expected.values())
    assert not all(expected.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("targeting")
    base = llama(place / "base", bias=True)
    train(base, LoraConfig(r=2, target_modules=TARGETS), place / "adapter")
    return base, place / "adapter"


@pytest.fixture
def edited(trained: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    def edit(**settings: Any) -> Path:
        folder = shutil.copytree(trained[1], tmp_path / "edited")
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), "utf-8")
        return folder

    return edit


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}, {"exclude_modules": ["q_proj"]}],
    ids=str,
)
def test_factors_that_peft_would_leave_out_are_refused(
    settings: dict[str, Any], trained: tuple[Path, Path], edited: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edited(**settings)
    with pytest.raises(AdapterError, match="modules that its config does not adapt"):
        merge(trained[0], folder, tmp_path / "out", MergeOptions(device="cpu"))
    merge(trained[0], folder, tmp_path / "out", MergeOptions(device="cpu", reading=ReadOptions(force=True)))
    contradictions = json.loads((tmp_path / "out" / "adapter_merge.json").read_text("utf-8"))["adapters"][0]
    assert "does not adapt" in contradictions["contradictions"][0]


def test_targets_without_factors_change_nothing(
    trained: tuple[Path, Path], edited: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT starts the factors of a target that the file leaves out at B = 0."""
    folder = edited(target_modules=[*TARGETS, "up_proj"])
    result = merge(trained[0], folder, tmp_path / "out", MergeOptions(device="cpu"))
    assert any("up_proj" in text for text in result.as_json()["warnings"])
    report = verify(trained[0], folder, tmp_path / "out", VerifyOptions(generated=2))
    assert report.passed, report.problems


def test_a_lora_bias_that_the_file_lacks_is_refused(trained: tuple[Path, Path], edited: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match=r"no lora_B.bias although lora_bias is set"):
        merge(trained[0], edited(lora_bias=True), "out", MergeOptions(device="cpu", dry_run=True))


def test_a_saved_module_that_the_file_lacks_is_refused(trained: tuple[Path, Path], edited: Callable[..., Path]) -> None:
    with pytest.raises(AdapterMergeError, match="modules_to_save names lm_head, and the file holds no tensor of it"):
        merge(trained[0], edited(modules_to_save=["lm_head"]), "out", MergeOptions(device="cpu", dry_run=True))
