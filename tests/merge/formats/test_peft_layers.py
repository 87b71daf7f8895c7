"""Types that PEFT's own layer merges, against PEFT's live model; and the table of every type of the installed PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_cases import TOLERANCE, bases, merged_logits
from peft_layer_cases import LAYER_CASES, SCALES
from pico_bases import gpt2, llama, load, logits, quiet, train
from safetensors.torch import load_file, save_file

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import IN_TURN, Ingredient, make_recipe
from adapter_merge.errors import (
    AdapterError,
    AdapterMergeError,
    InputError,
    MismatchError,
    MissingDependencyError,
    UnsupportedError,
)
from adapter_merge.formats.peft import layer_types
from adapter_merge.formats.peft.folder import METHODS
from adapter_merge.formats.peft.layer_types import LAYER_TYPES, REFUSED_TYPES, REPLACED_TYPES

CPU = MergeOptions(device="cpu")
TABLE = Path(__file__).parents[3] / "docs" / "peft_types.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    torch.set_num_threads(1)
    return bases(tmp_path_factory)


def trained(base: Path, kind: str, folder: Path, **changes: Any) -> Any:
    _, config, arguments = LAYER_CASES[kind]
    with quiet():
        return train(base, getattr(peft, config)(**arguments | changes), folder, scale=SCALES.get(kind, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYER_CASES)
def test_merged_logits_equal_the_live_model(kind: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base(LAYER_CASES[kind][0])
    want = logits(trained(folder, kind, tmp_path / "adapter"))
    assert float((want - logits(load(folder))).abs().max()) > 0.05, "an adapter without an effect proves nothing"
    got = merged_logits(folder, tmp_path / "adapter", tmp_path / "merged")
    assert float((got - want).abs().max()) <= TOLERANCE


def test_every_type_of_the_installed_peft_is_known_and_in_the_table() -> None:
    known = [*METHODS, *LAYER_TYPES, *REPLACED_TYPES, *REFUSED_TYPES]
    assert len(known) == len(set(known))
    assert {kind.value for kind in peft.PeftType} <= set(known), "a new PEFT has a new type: merge it or say why not"
    assert {*LAYER_TYPES, *REPLACED_TYPES} == set(LAYER_CASES)
    rows = TABLE.read_text(encoding="utf-8")
    assert [kind for kind in known if f"| {kind} |" not in rows] == []


@pytest.mark.parametrize("kind", ["OSF", "LN_TUNING", "ROAD"])
def test_verify_proves_a_merge_and_sees_a_spoiled_weight(
    kind: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = base(LAYER_CASES[kind][0])
    trained(folder, kind, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", CPU)
    options = VerifyOptions(generated=2)
    assert verify(folder, tmp_path / "adapter", tmp_path / "merged", options).as_json()["passed"]
    file = next((tmp_path / "merged").glob("model*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("q_proj.weight", "q_proj.bias", "input_layernorm.weight")))
    tensors[name][0] += 0.01
    save_file(tensors, file, {"format": "pt"})
    assert not verify(folder, tmp_path / "adapter", tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()[
        "passed"
    ]


def test_a_tensor_drawn_from_a_seed_may_be_left_out(base: Callable[[str], Path], tmp_path: Path) -> None:
    want = logits(trained(base("llama"), "RANDLORA", tmp_path / "adapter", save_projection=False))
    assert not [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "randlora_A" in name]
    got = merged_logits(base("llama"), tmp_path / "adapter", tmp_path / "merged")
    assert float((got - want).abs().max()) <= TOLERANCE


def test_a_bfloat16_base_is_merged_with_one_rounding(tmp_path: Path) -> None:
    with quiet():
        folder = llama(tmp_path / "base", dtype=torch.bfloat16)
    live = trained(folder, "HRA", tmp_path / "adapter").to(torch.float64)
    merge(folder, tmp_path / "adapter", tmp_path / "merged", CPU)
    layer = live.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        want = layer(torch.eye(layer.in_features, dtype=torch.float64)).T
    files = sorted((tmp_path / "merged").glob("model*.safetensors"))
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert torch.equal(merged["model.layers.0.self_attn.q_proj.weight"], want.to(torch.bfloat16))


LOW_RANK = {
    "DELORA": {}, "GRALORA": {"hybrid_r": 2}, "HRA": {}, "MISS": {}, "MISS mini": {"init_weights": "mini", "mini_r": 8},
    "PEANUT": {}, "PSOFT": {}, "PVERA": {}, "VBLORA": {},
}  # fmt: skip


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank_changes_have_exact_factors(case: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    """A plain LoRA of the type's own rank, which PEFT loads: its logits are those of the live model."""
    kind = case.split()[0]
    folder = base("llama")
    want = logits(trained(folder, kind, tmp_path / "adapter", **LOW_RANK[case]))
    made = factor(folder, tmp_path / "adapter", tmp_path / "factors", FactorOptions(device="cpu")).as_json()
    assert made["exact"]
    assert max(layer["relative_error"] for layer in made["layers"].values()) < 1e-6
    assert {layer["rank"] for layer in made["layers"].values()} == {10 if kind == "GRALORA" else 4}
    with quiet():
        plain = peft.PeftModel.from_pretrained(load(folder), str(tmp_path / "factors"))
    assert float((want - logits(load(folder))).abs().max()) > 0.05, "an adapter without an effect proves nothing"
    assert float((logits(plain) - want).abs().max()) <= TOLERANCE
    checked = verify(folder, tmp_path / "adapter", tmp_path / "factors", VerifyOptions(weights_only=True))
    assert checked.passed


def test_a_change_of_a_higher_rank_than_its_type_allows_is_an_error(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exact factors leave out is measured: a bound that is wrong is no silent truncation."""
    trained(base("llama"), "HRA", tmp_path / "adapter")
    monkeypatch.setattr(layer_types, "rank_bound", lambda kind, config: 3)
    with pytest.raises(UnsupportedError, match="changes the weight by more than rank 3"):
        factor(base("llama"), tmp_path / "adapter", tmp_path / "factors", FactorOptions(device="cpu"))


@pytest.mark.parametrize(("kind", "changes"), [("HIRA", {}), ("MISS", {"init_weights": "bat"})])
def test_factors_are_refused_and_truncations_state_their_error(
    kind: str, changes: dict[str, Any], base: Callable[[str], Path], tmp_path: Path
) -> None:
    trained(base("llama"), kind, tmp_path / "adapter", **changes)
    with pytest.raises(InputError, match=f"{kind} is merged by PEFT's own layer and has no exact low-rank factors"):
        factor(base("llama"), tmp_path / "adapter", tmp_path / "factors", FactorOptions(device="cpu"))
    assert not (tmp_path / "factors").exists()
    options = FactorOptions(device="cpu", rank=3)
    content = factor(base("llama"), tmp_path / "adapter", tmp_path / "factors", options).as_json()
    delta(base("llama"), tmp_path / "adapter", tmp_path / "delta", DeltaOptions(device="cpu"))
    change = load_file(tmp_path / "delta" / "delta.safetensors")["model.layers.0.self_attn.q_proj.weight"].double()
    values = torch.linalg.svdvals(change)
    best = float(values[3:].norm() / values.norm())  # Eckart-Young
    stated = content["layers"]["model.layers.0.self_attn.q_proj"]["relative_error"]
    assert stated == pytest.approx(best, rel=1e-3)


def _set(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_settings_that_peft_does_not_know_are_refused_and_other_releases_noted(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    trained(base("llama"), "HRA", tmp_path / "adapter")
    assert not inspect(tmp_path / "adapter").as_json()["notes"]
    _set(tmp_path / "adapter", peft_version="0.99.0", new_switch=None)
    notes = " ".join(inspect(tmp_path / "adapter", base("llama")).as_json()["notes"])
    assert "written by PEFT 0.99.0" in notes and "new_switch" in notes
    _set(tmp_path / "adapter", new_switch=1)
    with pytest.raises(UnsupportedError, match="'new_switch' is unknown"):
        merge(base("llama"), tmp_path / "adapter", tmp_path / "merged", CPU)


def test_weights_drawn_in_every_pass_are_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    trained(base("llama"), "PVERA", tmp_path / "adapter")
    _set(tmp_path / "adapter", sample_at_inference=True)
    with pytest.raises(UnsupportedError, match="drawn anew in every forward"):
        merge(base("llama"), tmp_path / "adapter", tmp_path / "merged", CPU)


@pytest.mark.parametrize("change", ["lacking", "unknown", "shape"])
def test_tensors_that_are_not_the_layers_are_refused(change: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    trained(base("llama"), "GRALORA", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.gralora_A"))
    if change == "lacking":
        del tensors[name]
    elif change == "unknown":
        tensors[name.replace("gralora_A", "gralora_C")] = torch.ones(2, 2)
    else:
        tensors[name] = torch.ones(3, 3)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="q_proj"):
        merge(base("llama"), tmp_path / "adapter", tmp_path / "merged", CPU)
    assert not (tmp_path / "merged").exists()


def test_other_layers_and_other_adapters_before_it_are_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    with quiet():
        other = gpt2(tmp_path / "gpt2")
        train(other, peft.HiraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True), tmp_path / "conv1d")
        train(base("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")
        train(base("llama"), peft.HiraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "embedding")
    with pytest.raises(MismatchError, match=r"HIRA is supported on nn\.Linear, not on Conv1D"):
        merge(other, tmp_path / "conv1d", tmp_path / "merged", CPU)
    with pytest.raises(AdapterMergeError, match="HIRA on an embedding is not supported"):
        merge(base("llama"), tmp_path / "embedding", tmp_path / "merged", CPU)
    trained(base("llama"), "HRA", tmp_path / "hra")
    parts = [Ingredient(name, str(tmp_path / name), 1.0) for name in ("lora", "hra")]
    with pytest.raises(InputError, match="initialised from the weight, which the adapter before it has changed"):
        merge(base("llama"), make_recipe(parts, Settings(IN_TURN, 1.0, seed=0)), tmp_path / "merged", CPU)
    assert not (tmp_path / "merged").exists()


def test_types_without_weights_are_refused_with_the_reason(base: Callable[[str], Path], tmp_path: Path) -> None:
    with quiet():
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        peft.get_peft_model(load(base("llama")), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="changes no weight"):
        merge(base("llama"), tmp_path / "adapter", tmp_path / "merged", CPU)


def test_without_peft_the_error_names_the_extra(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base("llama"), "HRA", tmp_path / "adapter")
    monkeypatch.setattr("adapter_merge.methods.peft_layer.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"\[verify\]"):
        merge(base("llama"), tmp_path / "adapter", tmp_path / "merged", CPU)
