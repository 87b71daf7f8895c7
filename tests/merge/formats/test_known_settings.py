"""Settings of adapters' configs: known, off, or refused; PEFT itself and the reference's formula are the oracles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_bases import llama, load, quiet, randomise
from safetensors.torch import load_file, save_file

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.combine.combined_adapter import open_combination
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.open_inputs import describe_inputs
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.errors import AdapterError, AdapterMergeError, InputError, UnsupportedError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.peft.known_settings import PEFT_SETTINGS
from adapter_merge.formats.stated_settings import ReadOptions

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A trained LoRA of square and other weights."""
    with quiet():
        model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        randomise(model)
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_every_setting_of_this_peft_is_known() -> None:
    """A new key of the installed PEFT is looked at by a person, not passed over."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, known in PEFT_SETTINGS.items():
        fields = {entry.name for entry in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        assert fields <= known.read | known.ignored | known.refused.keys(), kind


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_next_method", True),
        ("next_scale", 0),
        ("next_scale", 0.5),
        ("next_config", {"power": 2}),
        ("velora_config", {"rank": 1}),
        ("kasa_config", {"beta": 1}),
        ("layer_replication", [[0, 2]]),
        ("enable_lora", [True, False]),
        ("bias", "some"),
    ],
)
def test_a_setting_that_is_not_known_is_refused(adapter: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        open_adapter(edit(adapter, **{key: value}))
    assert key in str(caught.value) and str(value) in str(caught.value)


def test_a_newer_key_that_is_off_is_said(adapter: Path) -> None:
    opened = open_adapter(edit(adapter, use_next_method=False, next_config=None, next_list=[]))
    assert any("next_config, next_list, use_next_method" in note for note in opened.notes)


def test_fan_in_fan_out_of_a_linear_is_ignored_as_in_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT goes by the layer's type, so that a square weight is not transposed."""
    edit(adapter, fan_in_fan_out=True)
    with quiet():
        live = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    merge(base, adapter, tmp_path / "out", MergeOptions(device="cpu"))
    merged, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    key = f"{QUERY}.weight"
    assert before[key].shape[0] == before[key].shape[1] and not torch.equal(merged[key], before[key])
    for name, value in merged.items():
        torch.testing.assert_close(value, live[name], rtol=1e-5, atol=1e-6)


def test_fan_in_fan_out_of_an_unknown_class_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoModel": "own.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterMergeError, match="it is unknown whether its square weight"):
        merge(own, edit(adapter, fan_in_fan_out=True), tmp_path / "no", MergeOptions(device="cpu"))


def dcft(base: Path, folder: Path, **config: Any) -> Path:
    """The reference's checkpoint of one adapted square weight, kernel 4 x 4, r = 5."""
    torch.manual_seed(3)
    state = load_file(base / "model.safetensors")
    size = state[f"{QUERY}.weight"].shape[0]
    a, b, c = torch.randn(1, size // 4), torch.randn(size // 4, 1), torch.randn(1, 1, 4, 4)
    state |= {f"{QUERY}.lora_A": a, f"{QUERY}.lora_B": b, f"{QUERY}.lora_C": c, f"{QUERY}.ranknum": torch.tensor([5.0])}
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    content = json.loads((base / "config.json").read_text()) | {"apply_lora": True, "lora_type": "svd", "lora_r": 5}
    (folder / "config.json").write_text(json.dumps(content | {"lora_alpha": 8} | config))
    return folder


@pytest.mark.parametrize("alpha", [0, -1, 8])
def test_dcft_without_alpha_takes_r(base: Path, tmp_path: Path, alpha: int) -> None:
    """SVDLinear: scaling = lora_alpha if lora_alpha > 0 else float(r)."""
    checkpoint = dcft(base, tmp_path / "c", lora_alpha=alpha)
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    merge(checkpoint, checkpoint, tmp_path / "out", MergeOptions(device="cpu"))
    image = (state[f"{QUERY}.lora_A"].double().T @ state[f"{QUERY}.lora_B"].double().T)[None, None]
    dense = torch.nn.functional.conv_transpose2d(image, state[f"{QUERY}.lora_C"].double(), stride=4)[0, 0]
    exact = state[f"{QUERY}.weight"].double() + dense.T * (alpha if alpha > 0 else 5.0) / (5 + 1e-5)
    got = load_file(tmp_path / "out" / "model.safetensors")[f"{QUERY}.weight"]
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("apply_adapter", True),
        ("lora_type", "frd"),
        ("apply_lora", False),
        ("lora_r", 0),
        ("apply_bitfit", True),
        ("lora_power", 2),
    ],
)
def test_dcft_settings_that_are_refused(base: Path, tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=key):
        open_adapter(dcft(base, tmp_path / "c", **{key: value}))


def test_an_unknown_key_of_our_own_format(adapter: Path) -> None:
    """Nobody else writes these folders: whatever the value."""
    edit(adapter, peft_type="LYCORIS", format_version=1, next_key=None)
    with pytest.raises(AdapterError) as caught:
        open_adapter(adapter)
    assert any("'next_key' is unknown" in problem.cause for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"ss_network_module": "networks.oft"}, "networks.oft"),
        ({"ss_network_args": '{"algo": "boft"}'}, "boft"),
        ({"ss_network_args": '{"use_scalar": "True"}'}, "scalar"),
        ({"ss_network_args": '{"next_power": "2"}'}, "next_power"),
        ({"ss_network_args": "{"}, "cannot be read"),
        ({"ss_network_power": "2"}, "ss_network_power"),
    ],
)
def test_kohya_metadata_that_is_refused(tmp_path: Path, metadata: dict[str, str], names: str) -> None:
    file = tmp_path / "style.safetensors"
    tensors = {"lora_te_x.lora_down.weight": torch.randn(2, 8), "lora_te_x.lora_up.weight": torch.randn(8, 2)}
    save_file(tensors, file, {"ss_network_module": "lycoris.kohya", "ss_steps": "3"})
    assert open_adapter(file).method == "LoRA"
    save_file(tensors, file, {"ss_network_module": "lycoris.kohya", "ss_steps": "3"} | metadata)
    with pytest.raises(UnsupportedError, match=names):
        open_adapter(file)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 16.0},
        {"ranknum": 4.0},
        {"magnitude_axis": "in"},
        {"magnitudes": Path("m.safetensors")},
        {"init_adapter": Path("before")},
        {"residual_dtype": "float32"},
    ],
)
def test_an_option_that_does_nothing_is_an_error(
    base: Path, adapter: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plain LoRA in PEFT's form; `serve` reads its adapters in the same way."""
    save_file({"magnitude": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="has no effect on this adapter"):
        open_adapter(adapter, ReadOptions(**options))


def test_a_new_head_on_a_quantised_base(base: Path, tmp_path: Path) -> None:
    """An int8 tensor without a scale would be read as if it had one."""
    state = load_file(base / "model.safetensors")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for name in state:
        if state[name].ndim == 2 and name != f"{QUERY}.weight":
            state[name] = state[name].to(torch.int8)
    save_file(state, quantised / "model.safetensors", {"format": "pt"})
    (quantised / "config.json").write_text((base / "config.json").read_text())
    folder = tmp_path / "a"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["score"], "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    size = state[f"{QUERY}.weight"].shape
    save_file(
        {
            f"base_model.model.{QUERY}.lora_A.weight": torch.randn(2, size[1]),
            f"base_model.model.{QUERY}.lora_B.weight": torch.randn(size[0], 2),
            "base_model.model.score.weight": torch.randn(3, size[1]),
        },
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(UnsupportedError, match="a base that is quantised"):
        merge(quantised, folder, tmp_path / "no", MergeOptions(device="cpu"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings("ties"), "only the signs are elected"),
        (Settings("dare"), "the result is that of linear"),
        (Settings("ties", 0.5, seed=3), "the seed has no effect"),
        (Settings("dare", 0.5, seed=3), ""),
        (Settings("linear"), ""),
        (Settings("breadcrumbs", gamma=0.1), ""),
    ],
)
def test_a_combination_says_what_does_nothing(settings: Settings, said: str) -> None:
    notes = " ".join(make_recipe([Ingredient("a", "a"), Ingredient("b", "b")], settings).notes)
    assert (said in notes) if said else not notes


def test_the_notes_of_a_combination_are_its_adapters(base: Path, adapter: Path) -> None:
    ingredients = [Ingredient(name, str(adapter)) for name in ("a", "b")]
    bound = open_combination(make_recipe(ingredients, Settings("ties")), base)
    assert any("only the signs are elected" in note for note in bound.adapter.notes)
    assert "only the signs are elected" in str(describe_inputs(bound)["notes"])
