"""An edit in the middle of a base's weight, which its ends do not show, is found where weights are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, DeltaOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import MismatchError
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.storage.checkpoint import open_checkpoint

NAME = "model.layers.1.mlp.gate_proj.weight"  # (96, 48) float32: 18 KiB, of which 8 are sampled
ANOTHER = "names another base"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base of the training, and a copy of it with one row in the middle of a weight negated."""
    folder = tmp_path_factory.mktemp("bases")
    base = pico.save_base(pico.pico_model("llama"), folder / "base")
    edited = shutil.copytree(base, folder / "edited")
    for file in edited.glob("*.safetensors"):
        tensors = load_file(file)
        if NAME in tensors:
            tensors[NAME][48] *= -1
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            save_file(tensors, file, metadata)
    assert open_checkpoint(edited).fingerprint == open_checkpoint(base).fingerprint
    return base, edited


def _converted(base: Path, adapter: Path, output: Path) -> Path:
    convert(adapter, output, ConvertOptions(base=base))
    return output


def _factored(base: Path, adapter: Path, output: Path) -> Path:
    factor(base, adapter, output, FactorOptions(device="cpu"))
    return output


@pytest.mark.parametrize("make", [_converted, _factored])
def test_a_folder_knows_the_whole_weights_of_its_base(
    make: Callable[[Path, Path, Path], Path], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    base, edited = bases
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter")
    own = make(base, tmp_path / "adapter", tmp_path / "own")
    merge(base, own, tmp_path / "merged", MergeOptions(device="cpu"))
    weights_only = VerifyOptions(weights_only=True)
    assert verify(base, own, tmp_path / "merged", weights_only).passed
    with pytest.raises(MismatchError, match=ANOTHER):
        merge(edited, own, tmp_path / "out", MergeOptions(device="cpu"))
    with pytest.raises(MismatchError, match=ANOTHER):
        delta(edited, own, tmp_path / "out", DeltaOptions(device="cpu"))
    with pytest.raises(MismatchError, match=ANOTHER):
        verify(edited, own, tmp_path / "merged", weights_only)
    report = verify(edited, tmp_path / "adapter", own, weights_only)
    assert any(ANOTHER in text for text in report.problems)
    assert not (tmp_path / "out").exists()
    merge(edited, own, tmp_path / "out", MergeOptions(device="cpu", reading=ReadOptions(force=True)))


def test_a_checkpoint_is_compared_whole_with_another_copy_of_its_base(tmp_path: Path) -> None:
    base = pico.save_base(pico.pico_model("bert"), tmp_path / "base")
    checkpoint = pico.save_dcft_checkpoint(pico.dcft_model("bert"), tmp_path / "checkpoint")
    merge(base, checkpoint, tmp_path / "merged", MergeOptions(device="cpu"))
    file = checkpoint / "pytorch_model.bin"
    state = torch.load(file)
    for name in state:
        if name.endswith("value.weight"):
            state[name][20] *= -1
    torch.save(state, file)
    with pytest.raises(MismatchError, match="trained on another base"):
        merge(base, checkpoint, tmp_path / "out", MergeOptions(device="cpu"))
    with pytest.raises(MismatchError, match="trained on another base"):
        verify(base, checkpoint, tmp_path / "merged", VerifyOptions(weights_only=True))
