"""verify of truncated factors, plain and calibrated on a text: the right ones pass by themselves, wrong ones do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factor_models import WORDS, peft_adapter, pico_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.factor import factor
from adapter_merge.api.options import FactorOptions, VerifyOptions
from adapter_merge.api.verify import verify

RANK = 2
Factors = dict[str, Tensor]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    place = tmp_path_factory.mktemp("truncated")
    base = pico_model(place / "base")
    adapter = peft_adapter(base, place / "adapter", update=0.2)
    draw = torch.randint(3, len(WORDS), (200,), generator=torch.Generator().manual_seed(3))
    (place / "text.txt").write_text(" ".join(WORDS[index] for index in draw))
    return base, adapter, place / "text.txt"


@pytest.fixture(scope="module", params=["plain", "calibrated"])
def factors(
    request: pytest.FixtureRequest, inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    base, adapter, text = inputs
    folder = tmp_path_factory.mktemp("factors") / "factors"
    factor(base, adapter, folder, FactorOptions(rank=RANK, calibrate=text if request.param == "calibrated" else None))
    return folder


def test_truncated_factors_pass_without_options(factors: Path, inputs: tuple[Path, Path, Path]) -> None:
    report = verify(*inputs[:2], factors, VerifyOptions(generated=2))
    assert report.passed, report.problems
    assert report.as_json()["logits"]["max_difference"] > 1e-3
    assert any("truncated" in note for note in report.as_json()["notes"])


def zeroed(tensors: Factors) -> None:
    tensors[next(iter(tensors))].zero_()


def larger(tensors: Factors) -> None:
    tensors[next(iter(tensors))].mul_(1.02)


def one_direction_less(tensors: Factors) -> None:
    next(value for name, value in tensors.items() if name.endswith("lora_B.weight"))[:, 0] = 0


def other_rows(tensors: Factors) -> None:
    """Directions of the output that the delta has, but for one element."""
    next(value for name, value in tensors.items() if name.endswith("lora_B.weight"))[3, 1] += 0.05


@pytest.mark.parametrize("spoil", [zeroed, larger, one_direction_less, other_rows])
def test_other_factors_fail(
    spoil: Callable[[Factors], None], factors: Path, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(factors, tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, copy / "adapter_model.safetensors")
    report = verify(*inputs[:2], copy, VerifyOptions(weights_only=True))
    assert not report.passed


def test_a_manifest_does_not_make_plain_noise_a_calibration(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Factors in directions that the delta hardly has, and a manifest that says that they were calibrated."""
    base, adapter, _ = inputs
    factor(base, adapter, tmp_path / "out", FactorOptions(rank=4))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        u, s, v = torch.linalg.svd((tensors[other] @ tensors[name]).double(), full_matrices=False)
        tensors[name], tensors[other] = v[2:4].float().contiguous(), (u[:, 2:4] * s[2:4]).float().contiguous()
    save_file(tensors, tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    scale = config["lora_alpha"] / config["r"]
    (tmp_path / "out" / "adapter_config.json").write_text(
        json.dumps(config | {"r": 2, "lora_alpha": 2 * scale}), "utf-8"
    )
    manifest = json.loads((tmp_path / "out" / "adapter_merge.json").read_text("utf-8"))
    manifest["calibration"] = {"file": "text.txt", "sha256": "0" * 64, "tokens": 100, "shrinkage": 0.01}
    for figures in manifest["layers"].values():
        figures["relative_error"] = 1.0
    (tmp_path / "out" / "adapter_merge.json").write_text(json.dumps(manifest), "utf-8")
    report = verify(base, adapter, tmp_path / "out", VerifyOptions(weights_only=True))
    assert any("too large for a calibration" in text for text in report.problems), report.problems


def test_factors_whose_rank_holds_the_delta_must_be_exact(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A change of 5e-5 of dW is no truncation: the adapter's own rank leaves nothing out."""
    factor(*inputs[:2], tmp_path / "exact")
    options = VerifyOptions(weights_only=True)
    assert verify(*inputs[:2], tmp_path / "exact", options).passed
    tensors = load_file(tmp_path / "exact" / "adapter_model.safetensors")
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name].mul_(1 + 5e-5)
    save_file(tensors, tmp_path / "exact" / "adapter_model.safetensors")
    assert not verify(*inputs[:2], tmp_path / "exact", options).passed
