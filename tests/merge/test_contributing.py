"""The worked examples of CONTRIBUTING.md: its own blocks are loaded as files and added to their tables."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_bases import llama, quiet
from safetensors.torch import load_file, save_file

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.verify import verify
from adapter_merge.cli import main
from adapter_merge.errors import AdapterError, UnsupportedError
from adapter_merge.formats import detection
from adapter_merge.formats.peft import folder
from adapter_merge.methods.adapter import AdapterFormat

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
QUERY = "model.layers.0.self_attn.q_proj"
BLOCKS = dict(re.findall(r"```python\n# (.+?)\n(.*?)```", CONTRIBUTING.read_text("utf-8"), re.DOTALL))


def load_file_block(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    """Load a block that starts with a file's name as the module that the file would be."""
    name = f"adapter_merge.{path.removesuffix('.py').replace('/', '.')}"
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(BLOCKS[path], f"CONTRIBUTING.md: {path}", "exec"), vars(module))
    return module


def add_row(monkeypatch: pytest.MonkeyPatch, title: str, table: Any, names: dict[str, Any]) -> None:
    """Add a block of one dictionary entry to its table."""
    [(key, value)] = eval("{" + BLOCKS[title] + "}", names).items()
    assert key not in table
    monkeypatch.setitem(table, key, value)


@pytest.fixture
def outer_product(monkeypatch: pytest.MonkeyPatch) -> None:
    load_file_block(monkeypatch, "methods/outer_product.py")
    reader = load_file_block(monkeypatch, "formats/peft/outer_product.py")
    add_row(
        monkeypatch,
        "a row of METHODS in formats/peft/folder.py",
        folder.METHODS,
        vars(reader) | {"PeftMethod": folder.PeftMethod},
    )


@pytest.fixture
def up_down(monkeypatch: pytest.MonkeyPatch) -> None:
    [(name, value)] = re.findall(r'(\w+) = "(.+)"', BLOCKS["a member of AdapterFormat in methods/adapter.py"])
    member = str.__new__(AdapterFormat, value)
    member._name_, member._value_ = name, value
    monkeypatch.setattr(AdapterFormat, name, member, raising=False)
    reader = load_file_block(monkeypatch, "formats/up_down.py")
    add_row(
        monkeypatch,
        "a row of FILE_FORMATS in formats/detection.py",
        detection.FILE_FORMATS,
        vars(reader) | {"FileFormat": detection.FileFormat},
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    with quiet():
        return llama(tmp_path / "base")


def read_model(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def random_factors(base: Path, **shapes: str) -> dict[str, torch.Tensor]:
    """Random tensors by role; "out", "in" and "2" are the sizes of a shape."""
    out, inner = read_model(base)[f"{QUERY}.weight"].shape
    sizes = {"out": out, "in": inner, "2": 2}
    generator = torch.Generator().manual_seed(3)
    return {
        role: torch.randn([sizes[size] for size in shape.split()], generator=generator)
        for role, shape in shapes.items()
    }


def check_merged(base: Path, out: Path, delta: torch.Tensor) -> None:
    """Compare every tensor with the base's, and the query weight with base + delta, computed in float64."""
    before, after = read_model(base), read_model(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        expected = weight.to(torch.float64) + (delta if name == f"{QUERY}.weight" else 0)
        torch.testing.assert_close(after[name].to(torch.float64), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def outer_folder(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    factors = random_factors(base, u="out", v="in")
    save_file(
        {f"base_model.model.{QUERY}.outer_{role}": factor for role, factor in factors.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "OUTER", "scale": 0.5, "bias": "none", "target_modules": ["q_proj"]})
    )
    return path


def test_the_method_is_refused_without_its_row(base: Path, outer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="OUTER"):
        merge(base, outer_folder, tmp_path / "out")


@pytest.mark.usefixtures("outer_product")
def test_a_method_is_added(base: Path, outer_folder: Path, tmp_path: Path) -> None:
    assert detection.open_adapter(outer_folder).format is AdapterFormat.PEFT
    merge(base, outer_folder, tmp_path / "out")
    factors = {name: tensor.to(torch.float64) for name, tensor in random_factors(base, u="out", v="in").items()}
    product = 0.5 * torch.outer(factors["u"], factors["v"])
    check_merged(base, tmp_path / "out", product)
    factor(base, outer_folder, tmp_path / "factors")
    config = json.loads((tmp_path / "factors" / "adapter_config.json").read_text())
    a, b = (
        load_file(tmp_path / "factors" / "adapter_model.safetensors")[f"base_model.model.{QUERY}.lora_{role}.weight"]
        for role in "AB"
    )
    scale = config["lora_alpha"] / config["r"]
    torch.testing.assert_close((scale * b @ a).to(torch.float64), product, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="no formula"):
        verify(base, outer_folder, tmp_path / "out")


@pytest.mark.usefixtures("outer_product")
def test_the_method_refuses_what_it_does_not_know(outer_folder: Path) -> None:
    config_file = outer_folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "twist": 2}))
    with pytest.raises(UnsupportedError, match="twist"):
        detection.open_adapter(outer_folder)
    config_file.write_text(json.dumps(config))
    save_file({"base_model.model.lm_head.weight": torch.ones(2, 2)}, outer_folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds no adapter factors"):
        detection.open_adapter(outer_folder)


def test_a_format_is_added(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    file = tmp_path / "up_down.safetensors"
    factors = random_factors(base, up="out 2", down="2 in")
    tensors = {f"{QUERY}.{role}": factor for role, factor in factors.items()}
    save_file(tensors, file, {"alpha": "4"})
    with pytest.raises(AdapterError, match="not an adapter"):
        detection.open_adapter(file)
    request.getfixturevalue("up_down")
    opened = detection.open_adapter(file)
    assert (opened.format, opened.certainty) == ("up/down file", "certain")
    merge(base, file, tmp_path / "out")
    check_merged(base, tmp_path / "out", 2.0 * factors["up"].to(torch.float64) @ factors["down"].to(torch.float64))
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="alpha is missing"):
        detection.open_adapter(file)


def test_a_command_is_added(base: Path, outer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = CliRunner().invoke(main.group, ["size", str(outer_folder)])
    assert missing.exit_code != 0 and "No such command" in missing.output
    load_file_block(monkeypatch, "cli/size.py")
    add_row(monkeypatch, "a row of COMMANDS in cli/main.py", main.COMMANDS, {"LOOK": main.LOOK})
    lora = outer_folder.parent / "kohya.safetensors"
    save_file({"lora_te_q.lora_down.weight": torch.ones(2, 3), "lora_te_q.lora_up.weight": torch.ones(5, 2)}, lora)
    shown = CliRunner().invoke(main.group, ["size", str(lora)], catch_exceptions=False)
    assert shown.output == "16\n"
    assert "size" in CliRunner().invoke(main.group, ["--help"]).output
