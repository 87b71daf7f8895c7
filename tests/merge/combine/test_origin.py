"""Evidence of the base that an adapter was trained on: the right base agrees, another of the same shapes is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, InspectOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.binding.bound import UNKNOWN_ORIGIN
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.errors import AdapterError, AdapterMergeError, MismatchError
from adapter_merge.formats.stated_settings import ReadOptions

FORCED = ReadOptions(force=True)
ANOTHER = r"not trained on this base|trained on another base"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base of the training, another of the same shapes, and the first in bfloat16."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "base": pico.save_base(pico.pico_model("llama"), folder / "base"),
        "other": pico.save_base(pico.pico_model("llama", seed=5), folder / "other"),
        "half": pico.save_base(pico.pico_model("llama", torch.bfloat16), folder / "half"),
        "other half": pico.save_base(pico.pico_model("llama", torch.bfloat16, seed=5), folder / "other-half"),
    }


def trained(folder: Path, method: str, **config: Any) -> Path:
    pico.peft_adapter(pico.pico_model("llama"), "llama", folder, **pico.METHODS[method], **config)
    return folder


@pytest.mark.parametrize("method", ["dora", "dude", "pissa"])
def test_a_base_of_other_values_is_refused_by_every_job(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", method)
    assert inspect(adapter, bases["base"]).problems == ()
    assert re.search(ANOTHER, inspect(adapter, bases["other"]).problems[0])
    with pytest.raises(MismatchError, match=ANOTHER):
        merge(bases["other"], adapter, tmp_path / "out")
    with pytest.raises(MismatchError, match=ANOTHER):
        factor(bases["other"], adapter, tmp_path / "out")
    with pytest.raises(MismatchError, match=ANOTHER):
        convert(adapter, tmp_path / "out", ConvertOptions(base=bases["other"]))
    recipe = make_recipe([Ingredient("a", str(adapter)), Ingredient("b", str(adapter))], Settings())
    with pytest.raises(MismatchError, match=ANOTHER):
        merge(bases["other"], recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(bases["base"], adapter, tmp_path / "out", MergeOptions(device="cpu"))


def test_a_forced_merge_stays_marked(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", "dora")
    out = tmp_path / "out"
    merge(bases["other"], adapter, out, MergeOptions(device="cpu", reading=FORCED))
    (entry,) = json.loads((out / "adapter_merge.json").read_text())["adapters"]
    assert entry["stated"] == {"force": True} and "not trained on this base" in entry["contradictions"][0]
    with pytest.raises(MismatchError):
        verify(bases["other"], adapter, out, VerifyOptions(weights_only=True))
    report = verify(bases["other"], adapter, out, VerifyOptions(weights_only=True, reading=FORCED))
    assert report.passed and any("forced against evidence" in note for note in report.as_json()["notes"])


def test_nothing_tells_the_base_of_a_plain_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for base in ("base", "other"):
        report = inspect(adapter, bases[base]).as_json()
        assert report["problems"] == [] and report["base"]["origin"] == UNKNOWN_ORIGIN
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    assert (
        inspect(adapter, bases["base"]).as_json()["base"]["origin"]
        == "the adapter names org/base, and so does the base"
    )


@pytest.mark.parametrize("method", ["pissa", "dude"])
def test_a_false_base_kind_is_refused(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", method)
    safe = tmp_path / "safe"
    convert(adapter, safe, ConvertOptions(base=bases["base"]))
    for source in (adapter, safe):
        options = MergeOptions(base_kind="residual", device="cpu")
        with pytest.raises(MismatchError, match="the base is not the residual base that --base-kind states") as caught:
            merge(bases["base"], source, tmp_path / "out", options)
        assert "--base-kind residual" not in str(caught.value)
        assert inspect(source, bases["base"], InspectOptions(base_kind="residual")).problems
    merge(bases["base"], adapter, tmp_path / "lie", MergeOptions(base_kind="residual", device="cpu", reading=FORCED))
    (entry,) = json.loads((tmp_path / "lie" / "adapter_merge.json").read_text())["adapters"]
    assert entry["contradictions"] == ["the base is not the residual base that --base-kind states"]
    assert not verify(bases["base"], adapter, tmp_path / "lie", VerifyOptions(weights_only=True)).passed


def test_the_right_residual_base_agrees(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's own residual: the base weights inside the live model."""
    live = pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter", **pico.METHODS["pissa"])
    residual = pico.pico_model("llama")
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in live.state_dict().items()
        if "lora_" not in name
    }
    residual.load_state_dict(state, strict=True)
    pico.save_base(residual, tmp_path / "residual")
    report = inspect(tmp_path / "adapter", tmp_path / "residual").as_json()
    assert report["problems"] == [] and report["base"]["kind"] == "residual"
    assert "the base lacks the part that was subtracted before training" in report["base"]["origin"]


def test_a_checkpoint_that_holds_its_base_refuses_another(bases: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = pico.save_dcft_checkpoint(pico.dcft_model("llama"), tmp_path / "dcft")
    with pytest.raises(MismatchError, match="frozen weights are not this base's"):
        merge(bases["other"], checkpoint, tmp_path / "out")
    merge(bases["base"], checkpoint, tmp_path / "out", MergeOptions(device="cpu"))
    (entry,) = json.loads((tmp_path / "out" / "adapter_merge.json").read_text())["adapters"]
    assert "the checkpoint's frozen weights are this base's (14 compared, 6 of them in whole" in entry["origin"]
    merge(bases["half"], checkpoint, tmp_path / "rounded", MergeOptions(device="cpu"))  # the same base in bfloat16
    with pytest.raises(MismatchError, match="frozen weights are not this base's"):
        merge(bases["other half"], checkpoint, tmp_path / "no")
    for layer in range(2):  # one weight of another base is enough, in whichever layer
        model = pico.pico_model("llama")
        with torch.no_grad():
            model.model.layers[layer].self_attn.v_proj.weight.add_(0.01)
        nearly = pico.save_base(model, tmp_path / f"nearly-{layer}")
        with pytest.raises(MismatchError, match=f"1 of 14 compared.*layers.{layer}.self_attn.v_proj"):
            merge(nearly, checkpoint, tmp_path / "no")


def test_own_folders_know_their_base(bases: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = pico.save_dcft_checkpoint(pico.dcft_model("llama"), tmp_path / "dcft")
    convert(checkpoint, tmp_path / "safe", ConvertOptions(base=bases["base"]))
    adapter = trained(tmp_path / "adapter", "lora")
    factor(bases["base"], adapter, tmp_path / "factors")
    convert(checkpoint, tmp_path / "alone")  # without BASE the checkpoint's own weights are recorded
    for folder in ("safe", "factors", "alone"):
        assert "names this base's" in inspect(tmp_path / folder, bases["base"]).as_json()["base"]["origin"]
        with pytest.raises(MismatchError, match="names another base: the same tensors with other values"):
            merge(bases["other"], tmp_path / folder, tmp_path / "out")
        report = inspect(tmp_path / folder, bases["half"]).as_json()
        assert report["problems"] == [] and "another dtype or other names" in report["base"]["origin"]


def test_an_adapter_is_not_merged_twice(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter, again = trained(tmp_path / "adapter", "lora"), tmp_path / "again"
    merge(bases["base"], adapter, tmp_path / "once", MergeOptions(device="cpu"))
    with pytest.raises(MismatchError, match="already merged into this base"):
        merge(tmp_path / "once", adapter, again, MergeOptions(device="cpu"))
    assert "already merged" in inspect(adapter, tmp_path / "once").problems[0]
    with pytest.raises(AdapterMergeError, match="already merged into this base"):
        recipe = make_recipe([Ingredient("a", str(adapter))], Settings())
        merge(tmp_path / "once", recipe, again, MergeOptions(device="cpu"))
    merge(tmp_path / "once", adapter, again, MergeOptions(device="cpu", reading=FORCED))
    other = trained(tmp_path / "second", "lora", r=2)
    merge(tmp_path / "once", other, tmp_path / "both", MergeOptions(device="cpu"))
    factor(None, adapter, tmp_path / "factors")
    convert(adapter, tmp_path / "safe")
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    for base in ("once", "both"):  # the second one was merged into the first
        for form in (adapter, copy, tmp_path / "factors", tmp_path / "safe"):
            with pytest.raises(MismatchError, match="already merged into this base"):
                merge(tmp_path / base, form, again, MergeOptions(device="cpu"))
    merge(bases["base"], tmp_path / "factors", tmp_path / "of-factors", MergeOptions(device="cpu"))
    with pytest.raises(MismatchError, match="already merged into this base"):
        merge(tmp_path / "of-factors", adapter, again, MergeOptions(device="cpu"))


def test_a_base_with_another_adapter_merged_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    merge(bases["base"], trained(tmp_path / "first", "lora"), tmp_path / "once", MergeOptions(device="cpu"))
    second = trained(tmp_path / "second", "lora", r=2)
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    origin = inspect(second, tmp_path / "once").as_json()["base"]["origin"]
    assert origin == "the adapter names org/base; this base is base with adapters merged into it"


def test_a_number_that_contradicts_the_files_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """alpha 32 is in the checkpoint's config, ranknum 4 in its tensors; both are in the folder made of it."""
    checkpoint = pico.save_dcft_checkpoint(pico.dcft_model("llama"), tmp_path / "dcft")
    convert(checkpoint, tmp_path / "safe", ConvertOptions(base=bases["base"]))
    for source in (checkpoint, tmp_path / "safe"):
        for false, right in (({"alpha": 16.0}, {"alpha": 32.0}), ({"ranknum": 8.0}, {"ranknum": 4.0})):
            (option,) = false
            with pytest.raises(AdapterError, match=f"--{option} .* contradicts"):
                merge(bases["base"], source, tmp_path / "out", MergeOptions(reading=ReadOptions(**false)))
            with pytest.raises(AdapterError, match=f"--{option} .* contradicts"):
                convert(source, tmp_path / "out", ConvertOptions(reading=ReadOptions(**false)))
            assert inspect(source, options=InspectOptions(reading=ReadOptions(**false))).problems
            assert inspect(source, options=InspectOptions(reading=ReadOptions(**right))).problems == ()
    options = MergeOptions(device="cpu", reading=ReadOptions(alpha=16.0, force=True))
    merge(bases["base"], checkpoint, tmp_path / "forced", options)
    (entry,) = json.loads((tmp_path / "forced" / "adapter_merge.json").read_text())["adapters"]
    assert "--alpha 16 contradicts" in entry["contradictions"][0]


def test_a_number_that_contradicts_a_kohya_file_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "model_layers_0_self_attn_q_proj"
    tensors = {
        f"lora_te_{name}.lora_down.weight": torch.randn(4, 48),
        f"lora_te_{name}.lora_up.weight": torch.randn(48, 4),
    }
    (tmp_path / "silent").mkdir()
    save_file(tensors, tmp_path / "silent" / "a.safetensors")
    (tmp_path / "told").mkdir()
    save_file(tensors | {f"lora_te_{name}.alpha": torch.tensor(2.0)}, tmp_path / "told" / "a.safetensors")
    stated = InspectOptions(reading=ReadOptions(alpha=8.0))
    assert inspect(tmp_path / "silent", bases["base"], stated).problems == ()
    assert "--alpha 8 contradicts" in inspect(tmp_path / "told", bases["base"], stated).problems[0]


@pytest.mark.parametrize("method", ["pissa", "dude"])
def test_the_dtype_of_a_residual_is_asked_for(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", method)
    with pytest.raises(AdapterError, match="cannot tell the dtype of the frozen residual"):
        merge(bases["half"], adapter, tmp_path / "out")
    merge(bases["base"], adapter, tmp_path / "wide", MergeOptions(device="cpu"))
    for dtype, name in (("float32", "F32"), ("bfloat16", "BF16")):
        options = MergeOptions(device="cpu", reading=ReadOptions(residual_dtype=dtype))
        merge(bases["half"], adapter, tmp_path / dtype, options)
        (entry,) = json.loads((tmp_path / dtype / "adapter_merge.json").read_text())["adapters"]
        assert f"residual in {name}" in entry["evidence"]
