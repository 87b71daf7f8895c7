"""Merges that lay the base's tensors out in other files: sizes, index, values and what can be proved of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fuzz_folders import base_model, seeds
from safetensors.torch import load_file, save_file

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, RestoreOptions, VerifyOptions
from adapter_merge.api.restore import restore
from adapter_merge.api.verify import verify
from adapter_merge.errors import InputError
from adapter_merge.outputs.integrity import check_integrity

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in one file, the same base in three, and a LoRA."""
    folder = tmp_path_factory.mktemp("work")
    whole = load_file(base_model(folder / "base") / "model.safetensors")
    (folder / "three").mkdir()
    names = sorted(whole)
    placed = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(placed.values())):
        save_file({name: whole[name] for name in names if placed[name] == file}, folder / "three" / file)
    (folder / "three" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "three" / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    (folder / "lora").mkdir()
    for file, data in seeds()["lora"].items():
        (folder / "lora" / file).write_bytes(data)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("base", ["base", "three"])
@pytest.mark.parametrize("limit", [1, 600, 1500, 10**9])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_files_are_no_larger_and_hold_the_same(
    base: str, limit: int, dtype: str | None, work: Path, tmp_path: Path
) -> None:
    pair = (work / base, work / "lora")
    merge(*pair, tmp_path / "plain", MergeOptions(dtype=dtype))
    merge(*pair, tmp_path / "out", MergeOptions(dtype=dtype, max_shard_bytes=limit))
    wanted, found = weights(tmp_path / "plain"), weights(tmp_path / "out")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
    assert (len(files) == 1) == (limit == 10**9) and (len(files) == len(wanted)) == (limit == 1)
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        assert {name: (tmp_path / "out" / file) for name, file in index.items()} == {
            name: file for file in files for name in load_file(file)
        }
    else:
        assert files[0].name == "model.safetensors" and not (tmp_path / "out" / INDEX).exists()


def test_it_is_proved_and_restored_like_any_other(work: Path, tmp_path: Path) -> None:
    merge(work / "three", work / "lora", tmp_path / "out", MergeOptions(max_shard_bytes=600))
    check_integrity(tmp_path / "out")
    assert verify(work / "three", work / "lora", tmp_path / "out", VerifyOptions(weights_only=True)).passed
    restore(tmp_path / "out", tmp_path / "again", RestoreOptions(base=work / "three"))
    for file in (work / "three").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    merge(work / "three", work / "lora", tmp_path / "parts", MergeOptions(max_shard_bytes=600, part=(1, 2)))
    merge(work / "three", work / "lora", tmp_path / "parts", MergeOptions(max_shard_bytes=600, part=(2, 2)))
    merge(work / "three", work / "lora", tmp_path / "parts", MergeOptions(max_shard_bytes=600, finish=True))
    one, two = weights(tmp_path / "out"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_keeps_the_files_of_the_base_is_refused(work: Path, tmp_path: Path) -> None:
    for options in (
        MergeOptions(max_shard_bytes=600, keep_preimage=True),
        MergeOptions(max_shard_bytes=0),
    ):
        with pytest.raises(InputError, match="split into files"):
            merge(work / "base", work / "lora", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
