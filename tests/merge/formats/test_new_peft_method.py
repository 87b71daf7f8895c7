"""The worked example of CONTRIBUTING.md: a PEFT method is a module class, a reader and one row in METHODS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_bases import llama, quiet
from safetensors.torch import load_file, save_file

from adapter_merge.api.merge import merge
from adapter_merge.errors import AdapterError, UnsupportedError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.peft import folder
from adapter_merge.formats.peft.tensors import PeftExtras, PeftTensors, require_factors
from adapter_merge.formats.settings import KnownSettings
from adapter_merge.methods.adapter import AdaptedModule, AdapterFormat, ModuleDefaults, Reader, Weight
from adapter_merge.methods.canonical_form import CanonicalForm
from adapter_merge.storage.safetensors_header import TensorRef

QUERY = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class OuterModule(ModuleDefaults):
    """dW = scale u v^T: what would be a file in methods/."""

    name: str
    u: TensorRef  # (out,)
    v: TensorRef  # (in,)
    scale: float

    @property
    def rank(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.v.shape[0]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.u, self.v)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        return CanonicalForm(read(self.u).to(dtype)[:, None] * self.scale, read(self.v).to(dtype)[None])


def read_outer(
    tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """What would be a file in formats/peft/."""
    modules: list[AdaptedModule] = [
        OuterModule(name, group["u"], group["v"], float(config["scale"]))
        for name, group in sorted(tensors.groups.items())
    ]
    require_factors(modules, tensors)
    return "outer product", tuple(modules)


KNOWN = KnownSettings(frozenset({"peft_type", "scale", "bias"}))
OUTER = folder.PeftMethod({"outer_u": "u", "outer_v": "v"}, KNOWN, read_outer)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    with quiet():
        return llama(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    out, inner = _weights(base)[f"{QUERY}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    factors = {"u": torch.randn(out, generator=generator), "v": torch.randn(inner, generator=generator)}
    save_file(
        {f"base_model.model.{QUERY}.outer_{role}": factor for role, factor in factors.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "OUTER", "scale": 0.5, "bias": "none"}))
    return path


def test_one_row_makes_a_method_known(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match="OUTER"):
        merge(base, adapter, tmp_path / "refused", device="cpu")
    monkeypatch.setitem(folder.METHODS, "OUTER", OUTER)
    opened = open_adapter(adapter)
    assert opened.format is AdapterFormat.PEFT and opened.format == "PEFT folder"
    merge(base, adapter, tmp_path / "out", device="cpu")
    before, after = _weights(base), _weights(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    u, v = (factors[f"base_model.model.{QUERY}.outer_{role}"].to(torch.float64) for role in "uv")
    for name, weight in before.items():
        expected = weight.to(torch.float64)
        if name == f"{QUERY}.weight":
            expected = expected + 0.5 * torch.outer(u, v)
        torch.testing.assert_close(after[name].to(torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_a_folder_of_the_new_method_without_factors_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder.METHODS, "OUTER", OUTER)
    save_file(
        {"base_model.model.lm_head.weight": torch.ones(2, 2)},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="holds no adapter factors"):
        open_adapter(adapter)


def _weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}
