"""Folders that hold several adapters in folders of their own: listed, and one is asked for."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from factor_models import load, peft_adapter, pico_model

from adapter_merge.cli.main import group
from adapter_merge.errors import AdapterError
from adapter_merge.formats.detection import open_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("inside") / "base")


def several(base: Path, folder: Path, *names: str) -> Path:
    """Adapters of these names, saved by PEFT in one call."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(load(base), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft.LoraConfig(r=3, target_modules=["v_proj"]))
        model.save_pretrained(folder)
    return folder


def test_named_adapters_are_listed_and_each_can_be_given(base: Path, tmp_path: Path) -> None:
    folder = several(base, tmp_path / "all", "french", "german")
    with pytest.raises(AdapterError, match="holds 2 adapters") as caught:
        open_adapter(folder)
    problem = caught.value.problems[0]
    assert problem.got == "french, german"
    assert problem.hint == f"{folder}/german"
    assert {module.rank for module in open_adapter(folder / "german").modules} == {3}


def test_the_folder_s_own_adapter_is_read_and_the_others_are_named(base: Path, tmp_path: Path) -> None:
    opened = open_adapter(several(base, tmp_path / "all", "default", "german"))
    assert {module.rank for module in opened.modules} == {2}
    assert any("also holds german" in note for note in opened.notes)


def test_checkpoints_of_a_training_are_no_news_beside_the_final_adapter(base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "run")
    for step in (1000, 900):
        (adapter / f"checkpoint-{step}").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter / name, adapter / f"checkpoint-{step}" / name)
    assert not open_adapter(adapter).notes
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="holds 2 adapters") as caught:
        open_adapter(adapter)
    assert caught.value.problems[0].got == "checkpoint-900, checkpoint-1000"  # the last one is the hint
    assert caught.value.problems[0].hint == f"{adapter}/checkpoint-1000"


def test_a_base_without_config_is_merged_with_a_warning(base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "lora")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "model.safetensors", bare)
    arguments = ["merge", str(bare), str(adapter), "-o", str(tmp_path / "out"), "--device", "cpu"]
    for extra in (["--dry-run"], []):
        run = CliRunner().invoke(group, [*arguments, *extra])
        assert run.exit_code == 0, run.output
        assert "has no config.json" in run.stderr
    arguments[1:] = [str(base), *arguments[2:-3], str(tmp_path / "fine"), "--device", "cpu"]
    run = CliRunner().invoke(group, arguments)
    assert run.exit_code == 0, run.output
    assert "config.json" not in run.stderr
