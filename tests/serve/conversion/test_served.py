"""From an adapter in any form to the folder that vLLM loads: names, keys, refusals, changes under way."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import World

from adapter_merge.api.factor import factor
from adapter_merge.errors import InputError, MismatchError, UnsupportedError
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter, allowed_rank, check_name, inside, signature


@pytest.fixture
def converter(qwen2: World, tmp_path: Path) -> Converter:
    return Converter(qwen2.base, Cache(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["lora", "dcft", "dora", "dude"])
def test_raw_folders_become_exact_factors(qwen2: World, converter: Converter, kind: str) -> None:
    """(W0 + B A) times the row scale is the merged weight, to float32."""
    adapter = qwen2.adapters[f"{kind}-1"]
    served = converter.obtain(adapter.raw)
    assert served.form == ("lora+row_scale" if kind in ("dora", "dude") else "lora")
    assert served.rank == (16 if kind == "dude" else 8)
    tensors = load_file(served.folder / "adapter_model.safetensors")
    scales = load_file(served.folder / "row_scale.safetensors") if served.form != "lora" else {}
    for name, merged in adapter.merged.items():
        key = "base_model.model." + name.removesuffix(".weight")
        product = tensors[key + ".lora_B.weight"].double() @ tensors[key + ".lora_A.weight"].double()
        weight = qwen2.oracle.weights[name] + product
        if scales:
            weight = scales[key + ".row_scale"].double()[:, None] * weight
        torch.testing.assert_close(weight, merged, rtol=1e-5, atol=1e-6)
    again = converter.obtain(served.folder)
    assert again.folder == served.folder


def test_a_factor_folder_is_taken_as_it_is(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    made = converter.obtain(qwen2.adapters["dude-1"].raw).folder
    copy = tmp_path / "factors"
    shutil.copytree(made, copy)
    served = converter.obtain(copy)
    assert served.folder != made
    for name in ("adapter_model.safetensors", "row_scale.safetensors", "adapter_config.json"):
        assert (served.folder / name).read_bytes() == (made / name).read_bytes()


def test_the_evidence_of_the_base_stays_with_the_entry(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """Found when it is converted, and told again by each later start; of a factor folder too."""
    raw = tmp_path / "adapter"
    shutil.copytree(qwen2.adapters["dora-1"].raw, raw)
    config = json.loads((raw / "adapter_config.json").read_text())
    name = f"org/{qwen2.base.name}"
    (raw / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    first = converter.obtain(raw)
    assert first.origin.startswith("magnitudes follow the base's row norms")
    assert first.origin.endswith(f"the adapter names {name}, and so does the base")
    assert first.seconds is not None
    again = converter.obtain(raw)
    assert (again.origin, again.seconds) == (first.origin, None)
    copy = tmp_path / "factors"
    shutil.copytree(first.folder, copy)
    assert "this base's fingerprint" in converter.obtain(copy).origin


def test_a_base_that_the_adapter_contradicts_is_refused(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """The same shapes with other values: a DoRA's magnitudes are not its row norms."""
    other = tmp_path / "other"
    shutil.copytree(qwen2.base, other)
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        if weight.dim() == 2:
            rows = torch.rand(weight.shape[0], 1, generator=generator)
            weights[name] = (torch.randn(weight.shape, generator=generator) * 9 * (0.1 + rows)).to(weight.dtype)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="not trained on this base"):
        Converter(other, converter.cache).obtain(qwen2.adapters["dora-1"].raw)


def test_factors_for_another_base_are_refused(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    copy = tmp_path / "factors"
    shutil.copytree(converter.obtain(qwen2.adapters["dude-1"].raw).folder, copy)
    other = tmp_path / "other"
    shutil.copytree(qwen2.base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="another base"):
        Converter(other, converter.cache).obtain(copy)


def test_any_change_is_another_folder(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """One bit of the adapter, or another base: another key, so never another adapter's prefix blocks."""
    raw = tmp_path / "adapter"
    shutil.copytree(qwen2.adapters["dora-1"].raw, raw)
    before, seen = converter.obtain(raw).folder, signature(raw)
    tensors = load_file(raw / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key].view(-1)[0] += 1e-3
    save_file(tensors, raw / "adapter_model.safetensors")
    assert signature(raw) != seen
    after = converter.obtain(raw).folder
    assert after != before
    other = tmp_path / "base"
    shutil.copytree(qwen2.base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert Converter(other, converter.cache).obtain(raw).folder not in (before, after)


def test_an_edit_in_the_middle_of_a_weight_is_another_base(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    """The fingerprint looks at both ends of each tensor; row scales depend on all of it."""
    raw, base = qwen2.adapters["dude-1"].raw, tmp_path / "edited"
    shutil.copytree(qwen2.base, base)
    before = Converter(base, converter.cache)
    made = before.obtain(raw).folder
    assert Converter(base, converter.cache).obtain(raw).folder == made
    name = "model.layers.0.self_attn.q_proj.weight"
    ref = before.checkpoint.tensors[name]
    assert ref.nbytes > 8192
    about = ref.file.stat()
    with ref.file.open("r+b") as stream:
        stream.seek((ref.start + ref.stop) // 2 // 4 * 4)
        stream.write(b"\0\0\0\x3f")
    os.utime(ref.file, ns=(about.st_atime_ns, about.st_mtime_ns))
    after = Converter(base, converter.cache)
    assert after.checkpoint.fingerprint == before.checkpoint.fingerprint
    assert after.obtain(raw).folder != made


def test_an_adapter_that_changes_meanwhile(
    qwen2: World, converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is replaced between its hash and its conversion: what is served is what is there at the end."""
    raw = tmp_path / "adapter"
    shutil.copytree(qwen2.adapters["lora-1"].raw, raw)
    expected = converter.obtain(qwen2.adapters["dude-1"].raw).folder
    obtain_entry = converter.cache.obtain
    swapped = []

    def swap_first(key, make):  # type: ignore[no-untyped-def]
        def swap_and_make(folder):  # type: ignore[no-untyped-def]
            if not swapped:
                swapped.append(True)
                shutil.rmtree(raw)
                shutil.copytree(qwen2.adapters["dude-1"].raw, raw)
            return make(folder)

        return obtain_entry(key, swap_and_make)

    monkeypatch.setattr(converter.cache, "obtain", swap_first)
    served = converter.obtain(raw)
    assert swapped == [True]
    mine = load_file(served.folder / "adapter_model.safetensors")
    theirs = load_file(expected / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert len(converter.cache.entries()) == 1


def test_whole_tensors_and_embeddings_are_refused(qwen2: World, converter: Converter, tmp_path: Path) -> None:
    raw = tmp_path / "adapter"
    shutil.copytree(qwen2.adapters["lora-1"].raw, raw)
    tensors = load_file(raw / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(512, 256)
    save_file(tensors, raw / "adapter_model.safetensors")
    config = json.loads((raw / "adapter_config.json").read_text())
    (raw / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(UnsupportedError, match="trained in full"):
        converter.obtain(raw)
    tensors.pop("base_model.model.lm_head.weight")
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(8, 256)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(512, 8)
    save_file(tensors, raw / "adapter_model.safetensors")
    targets = [*config["target_modules"], "lm_head"]
    (raw / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    with pytest.raises(UnsupportedError, match="only linear layers"):
        converter.obtain(raw)
    assert converter.cache.entries() == []


@pytest.mark.parametrize("form", ["as trained", "factors"])
def test_convolutions_are_refused(tmp_path: Path, form: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT makes the adapter (extra verify)")
    transformers = pytest.importorskip("transformers", reason="transformers makes the model (extra verify)")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    model = transformers.ResNetForImageClassification(config)
    lora = peft.LoraConfig(r=2, target_modules=["convolution"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers, about what is meant here
        model.save_pretrained(tmp_path / "base")
        peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    if form == "factors":
        adapter = tmp_path / "factors"
        factor(tmp_path / "base", tmp_path / "adapter", adapter)
    with pytest.raises(UnsupportedError, match="a convolution"):
        Converter(tmp_path / "base", Cache(tmp_path / "cache")).obtain(adapter)


def test_linear_targets(converter: Converter) -> None:
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(converter.linear_targets()) == attention | {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("rank", [1, 8, 9, 16, 17, 64, 257, 320, 321, 512])
def test_ranks(rank: int) -> None:
    allowed = allowed_rank(rank)
    assert allowed >= rank
    assert allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert all(smaller < rank for smaller in (1, 8, 16, 32, 64, 128, 256, 320, 512) if smaller < allowed)


def test_ranks_too_large() -> None:
    with pytest.raises(UnsupportedError, match="merge"):
        allowed_rank(513)


@pytest.mark.parametrize("name", ["a", "a.b-c_d", "Qwen2.5", "x" * 200])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "a\\b", "a\0", "a..b", "ä", "a b", "x" * 201])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        check_name(name)


def test_inside_a_folder(tmp_path: Path) -> None:
    directory, outside = tmp_path / "adapters", tmp_path / "outside"
    (directory / "good").mkdir(parents=True)
    (directory / "good" / "file").write_text("")
    outside.mkdir()
    (directory / "leaving").symlink_to(outside)
    (directory / "within").symlink_to(directory / "good")
    (directory / "part").mkdir()
    (directory / "part" / "file").symlink_to(tmp_path / "secret")
    assert inside(directory, "good") == directory / "good"
    assert inside(directory, "within") == directory / "within"
    assert inside(directory, "missing") is None
    for name in ("leaving", "part", "../outside", "..", "good/../../outside"):
        with pytest.raises(InputError):
            inside(directory, name)
