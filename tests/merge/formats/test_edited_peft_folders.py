"""PEFT folders whose config and tensors contradict each other, so that PEFT computes other logits: they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import BASES, CASES, TOLERANCE
from pico_bases import error, llama, load, logits, quiet, train
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import AdapterMergeError

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]  # of the config and the tensors


def setting(**values: Any) -> Edit:
    return lambda config, tensors: config.update(values)


def without_targets(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["target_modules"]


def zero_one_side(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"].zero_()


def rename_bias(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.base_layer.bias"))
    tensors[name.replace(".base_layer", "")] = tensors.pop(name)


def drop(part: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return edit


CONTRADICTORY: dict[str, tuple[str, Edit, str]] = {  # name -> (case, edit, words of the refusal)
    "no target_modules": ("lora", without_targets, "does not adapt"),
    "all-linear and a head": ("head", setting(target_modules="all-linear"), "does not adapt"),
    "all-linear and embeddings": ("embedding", setting(target_modules="all-linear"), "does not adapt"),
    "all-linear and other biases": ("bias all", setting(target_modules="all-linear"), "under names that PEFT"),
    "a bias of no layer": ("bias lora_only", rename_bias, "under names that PEFT"),
    "tokens of another module": ("tokens alone", setting(target_modules=["q_proj"]), "does not adapt"),
    "tied weights untargeted": ("embedding, kept tied", setting(target_modules=["q_proj"]), "does not adapt"),
    "two sides of tied factors": ("embedding, kept tied", zero_one_side, "not those of the embeddings"),
    "one side of tied factors": ("head, tied", setting(ensure_weight_tying=True), "ensure_weight_tying"),
    "tied embedding in whole": ("saved embedding, tied", setting(modules_to_save=None), "modules_to_save does not"),
    "LoKr of another rank": ("LoKr, both decomposed", setting(r=1), "the rank of"),
    "LoKr decomposed otherwise": ("LoKr, both decomposed", setting(decompose_both=False), "does not load"),
    "LoKr in full": ("LoKr, both full", setting(r=2), "does not load"),
    "LoHa of another rank": ("LoHa", setting(r=2), "the rank of"),
    "PiSSA of factors that are none": ("lora", setting(init_lora_weights="pissa"), "cannot tell whether the base"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            with quiet():
                made[kind] = BASES[kind](tmp_path_factory.mktemp("base") / "base")
        return made[kind]

    return make


def edited(folder: Path, edit: Edit) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", CONTRADICTORY)
def test_contradictory_folder_is_refused(name: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    case, edit, words = CONTRADICTORY[name]
    kind, method, arguments = CASES[case]
    with quiet():
        config = getattr(peft, method)(**arguments)
    train(base(kind), config, tmp_path / "a", scale=0.02 if name.startswith("PiSSA") else 0.1)
    edited(tmp_path / "a", edit)
    with pytest.raises(AdapterMergeError, match=words):
        merge(base(kind), tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert not (tmp_path / "out").exists()


def test_fan_in_fan_out_of_vera_on_a_linear_layer(base: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT warns and ignores it; a square weight does not show its orientation."""
    with quiet():
        config = peft.VeraConfig(r=4, target_modules=["q_proj"])
    live = train(base("llama"), config, tmp_path / "a")
    edited(tmp_path / "a", setting(fan_in_fan_out=True))
    merge(base("llama"), tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert error(logits(load(tmp_path / "out")), logits(live)) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", ["values", "size"])
def test_embeddings_saved_beside_their_lora(change: str, tied: bool, tmp_path: Path) -> None:
    """PEFT saves targeted embeddings, and loads them: other values than the base's, or a resized vocabulary."""
    if change == "size" and not tied:
        return  # refused: PEFT does not save the resized head
    base = llama(tmp_path / "base", tied=tied)

    def changed(model: Any) -> None:
        torch.manual_seed(5)
        if change == "size":
            model.resize_token_embeddings(70, mean_resizing=False)
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight.add_(0.1 * torch.randn_like(weight))

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    live = train(base, config, tmp_path / "a", before=changed)
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert error(logits(load(tmp_path / "out")), logits(live)) < TOLERANCE
    report = verify(base, tmp_path / "a", tmp_path / "out", VerifyOptions(generated=2))
    assert report.passed, report.problems


@pytest.mark.parametrize("tied", [True, False])
def test_verify_with_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    """The prompts hold added tokens, which the base does not know."""
    base = llama(tmp_path / "base", tied=tied)
    live = train(
        base,
        peft.LoraConfig(r=4, target_modules=["q_proj"]),
        tmp_path / "a",
        before=lambda model: model.resize_token_embeddings(90, mean_resizing=False),
    )
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert error(logits(load(tmp_path / "out")), logits(live)) < TOLERANCE
    report = verify(base, tmp_path / "a", tmp_path / "out", VerifyOptions(generated=2))
    assert report.passed, report.problems


def test_a_resized_head_without_its_embeddings(tmp_path: Path) -> None:
    """No model of transformers loads a head of another size than the embeddings."""
    base = llama(tmp_path / "base")
    train(
        base,
        peft.LoraConfig(r=4, target_modules=["q_proj"]),
        tmp_path / "a",
        before=lambda model: model.resize_token_embeddings(70, mean_resizing=False),
    )
    edited(tmp_path / "a", drop("embed_tokens"))
    with pytest.raises(AdapterMergeError, match="vocabulary was resized"):
        merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
