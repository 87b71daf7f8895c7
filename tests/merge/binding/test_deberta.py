"""DCFT on DeBERTa-v2 and v3, whose positional queries keep the frozen weight, against the authors' unmerged forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deberta_reference as reference
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.restore import restore
from adapter_merge.api.verify import verify
from adapter_merge.combine.delta_ops import Settings
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.errors import InputError, UnsupportedError

TOLERANCE = 1e-6
SHARED = "share_att_key"
QUERY = "deberta.encoder.layer.0.attention.self.query_proj"
VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": ["p2c"]},
    "content": {"pos_att_type": []},
    "absolute": {"relative_attention": False, "position_biased_input": True},
    "no buckets": {"position_buckets": -1, "max_relative_positions": 16},
    "own projections": {SHARED: False},
    "own projections, p2c": {SHARED: False, "pos_att_type": ["p2c"]},
}
APART = ("v3", "p2c", "no buckets")  # whose positional queries need a weight of their own once they are merged


def load(folder: Path) -> Any:
    """The model in `folder`, by transformers alone."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def differs(model: Any, want: torch.Tensor) -> float:
    return float((reference.double_logits(model) - want).abs().max())


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def dcft(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """(base, checkpoint, float64 logits as trained) of a pico DeBERTa as v3 is configured."""
    reference.pico_deberta().save_pretrained(tmp_path / "base")
    model = reference.authors_model(reference.pico_deberta())
    checkpoint = reference.save_authors_checkpoint(model, tmp_path / "checkpoint")
    return tmp_path / "base", checkpoint, reference.double_logits(model)


def naive_merge(base: Path, checkpoint: Path, output: Path) -> Path:
    """One weight for tokens and positions: what a merge makes that does not know of the frozen queries."""
    state = torch.load(checkpoint / "pytorch_model.bin")
    model = load(base)
    for name, parameter in reference.authors_model(reference.pico_deberta()).named_modules():
        if isinstance(parameter, reference.SVDLinear):
            state[f"{name}.weight"] = state[f"{name}.weight"] + parameter.delta().T.detach()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.save_pretrained(output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_the_authors_forward(variant: str, tmp_path: Path) -> None:
    model = reference.authors_model(reference.pico_deberta(**VARIANTS[variant]))
    checkpoint = reference.save_authors_checkpoint(model, tmp_path / "checkpoint")
    shared = config_of(checkpoint).get(SHARED, False)
    want = reference.double_logits(model)
    merge(None, checkpoint, tmp_path / "merged")
    assert differs(load(tmp_path / "merged"), want) < TOLERANCE
    assert differs(reference.pico_deberta(**VARIANTS[variant]), want) > 0.05
    assert config_of(tmp_path / "merged")[SHARED] is (shared and variant not in APART)
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load(tmp_path / "merged").state_dict())
    report = verify(None, checkpoint, tmp_path / "merged").as_json()
    assert report["passed"] is True, report["problems"]
    assert report["logits"]["effect"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [("query_proj",), ("key_proj", "value_proj"), ("layer.1.attention.self.query_proj",)]
)
def test_any_choice_of_layers(targets: tuple[str, ...], tmp_path: Path) -> None:
    model = reference.authors_model(reference.pico_deberta(pos_att_type="p2c|c2p"), targets)
    checkpoint = reference.save_authors_checkpoint(model, tmp_path / "checkpoint")
    change(checkpoint / "config.json", pos_att_type="p2c|c2p")  # as microsoft/deberta-v3-base says it
    want = reference.double_logits(model)
    merge(None, checkpoint, tmp_path / "merged")
    assert differs(load(tmp_path / "merged"), want) < TOLERANCE
    assert config_of(tmp_path / "merged")[SHARED] is ("query_proj" not in targets[0])
    assert verify(None, checkpoint, tmp_path / "merged").as_json()["passed"] is True


@pytest.mark.slow
def test_converted_and_on_a_base_in_half_precision(dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, checkpoint, want = dcft
    convert(checkpoint, tmp_path / "adapter", ConvertOptions(base=base))
    merge(base, tmp_path / "adapter", tmp_path / "merged", MergeOptions(keep_preimage=True))
    assert differs(load(tmp_path / "merged"), want) < TOLERANCE
    assert verify(base, checkpoint, tmp_path / "adapter").as_json()["passed"] is True
    restore(tmp_path / "merged", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert config_of(tmp_path / "restored") == config_of(base)

    load(base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    merge(tmp_path / "half", tmp_path / "adapter", tmp_path / "half_merged")
    state, before = (load_file(tmp_path / one / "model.safetensors") for one in ("half_merged", "half"))
    assert torch.equal(state[QUERY.replace("query", "pos_query") + ".weight"], before[f"{QUERY}.weight"])
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert verify(tmp_path / "half", tmp_path / "adapter", tmp_path / "half_merged").as_json()["passed"] is True


def test_trained_biases_move_tokens_and_positions(dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    """nn.Linear.forward takes the bias as it is: one that was trained belongs to the positional queries as well."""
    base, _, plain = dcft
    model = reference.authors_model(reference.pico_deberta())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query_proj.bias", "key_proj.bias")):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    checkpoint = reference.save_authors_checkpoint(model, tmp_path / "biased")
    want = reference.double_logits(model)
    assert float((want - plain).abs().max()) > 1e-3
    merge(base, checkpoint, tmp_path / "merged")
    assert differs(load(tmp_path / "merged"), want) < TOLERANCE
    assert verify(base, checkpoint, tmp_path / "merged").as_json()["passed"] is True


@pytest.mark.slow
def test_verify_fails_a_merge_that_adapts_the_positional_queries(
    dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, checkpoint, want = dcft
    naive = naive_merge(base, checkpoint, tmp_path / "naive")
    assert differs(load(naive), want) > 0.01
    for weights_only in (False, True):
        report = verify(base, checkpoint, naive, VerifyOptions(weights_only=weights_only)).as_json()
        assert report["passed"] is False
        assert any("share_att_key is True" in problem for problem in report["problems"])
    assert any("dlogit" in problem for problem in verify(base, checkpoint, naive).as_json()["problems"])
    # The same mistake in the code that binds, merges and lists the weights: the live forward alone tells.
    monkeypatch.setattr("adapter_merge.binding.bind.add_positional_projections", lambda bound: bound)
    merge(base, checkpoint, tmp_path / "again")
    assert differs(load(tmp_path / "again"), want) > 0.01
    report = verify(base, checkpoint, tmp_path / "again").as_json()
    assert report["passed"] is False
    assert any("dlogit" in problem for problem in report["problems"])


def test_verify_looks_at_the_new_projections(dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, checkpoint, _ = dcft
    merge(base, checkpoint, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    state = load_file(file)
    for name in ("pos_query_proj.weight", "pos_query_proj.bias", "pos_key_proj.weight", "pos_key_proj.bias"):
        full = f"{QUERY.rpartition('.')[0]}.{name}"
        save_file(state | {full: 1.02 * state[full]}, file, {"format": "pt"})
        assert (
            verify(base, checkpoint, tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()["passed"] is False
        )
        save_file({key: value for key, value in state.items() if key != full}, file, {"format": "pt"})
        assert (
            verify(base, checkpoint, tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()["passed"] is False
        )
    save_file(state, file, {"format": "pt"})
    assert verify(base, checkpoint, tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()["passed"] is True
    change(tmp_path / "merged" / "config.json", **{SHARED: True})
    assert verify(base, checkpoint, tmp_path / "merged", VerifyOptions(weights_only=True)).as_json()["passed"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_peft_adapts_both_uses(settings: dict[str, Any], dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base = dcft[0]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["query_proj", "key_proj"], task_type="SEQ_CLS", **settings)
    live = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    live.save_pretrained(tmp_path / "adapter")
    want = reference.double_logits(live.eval())
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert config_of(tmp_path / "merged") == config_of(base)
    assert differs(load(tmp_path / "merged"), want) < 1e-5
    assert verify(base, tmp_path / "adapter", tmp_path / "merged").as_json()["passed"] is True


def test_deltas_say_what_base_they_belong_to(dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, checkpoint, want = dcft
    content = delta(base, checkpoint, tmp_path / "delta").as_json()
    changes = content["base_changes"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **changes["config"])
    state = model.state_dict()
    for name, source in changes["copies"].items():
        state[name].copy_(state[source])
    for name, tensor in load_file(tmp_path / "delta" / "delta.safetensors").items():
        state[name].add_(tensor)
    assert differs(model, want) < TOLERANCE
    assert verify(base, checkpoint, tmp_path / "delta").as_json()["passed"] is True
    file = tmp_path / "delta" / "delta.safetensors"
    deltas = load_file(file)
    save_file({name: value for name, value in deltas.items() if "pos_key" not in name}, file)
    assert verify(base, checkpoint, tmp_path / "delta", VerifyOptions(weights_only=True)).as_json()["passed"] is False


def test_factors_are_refused(dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, checkpoint, _ = dcft
    convert(checkpoint, tmp_path / "adapter", ConvertOptions(base=base))
    for given in ({}, {"rank": 2}, {"budget": 0.1}):
        with pytest.raises(UnsupportedError, match=r"positions \(share_att_key\)"):
            factor(base, tmp_path / "adapter", tmp_path / "out", FactorOptions(**given))
    with pytest.raises(UnsupportedError, match="share_att_key"):
        factor(None, checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match="share_att_key"):
        factor(None, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert inspect(tmp_path / "adapter", base).as_json()["would"]["factor"].startswith("refused")
    assert inspect(checkpoint).as_json()["would"]["factor"].startswith("refused")


def test_factors_where_positions_have_their_own_projections(tmp_path: Path) -> None:
    plain = reference.pico_deberta(**{SHARED: False})
    plain.save_pretrained(tmp_path / "base")
    model = reference.authors_model(plain)
    checkpoint = reference.save_authors_checkpoint(model, tmp_path / "checkpoint")
    factor(tmp_path / "base", checkpoint, tmp_path / "factors")
    live = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "factors").eval()
    assert differs(live, reference.double_logits(model)) < 1e-5
    assert verify(tmp_path / "base", checkpoint, tmp_path / "factors").as_json()["passed"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pos_att_type": ["c2p", "p2p"]}, "not known"),
        ({"model_type": "sew-d"}, "not known"),
        ({"model_type": None}, "model_type"),
    ],
    ids=["p2p", "another architecture", "no architecture"],
)
def test_what_the_authors_do_not_define_is_refused(
    settings: dict[str, Any], message: str, dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = dcft[1]
    change(checkpoint / "config.json", **settings)
    with pytest.raises(UnsupportedError, match=message):
        merge(None, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_combinations(dcft: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, checkpoint, _ = dcft
    convert(checkpoint, tmp_path / "first", ConvertOptions(base=base))
    second = reference.authors_model(reference.pico_deberta(), ("query_proj", "value_proj"), kernel=4)
    convert(
        reference.save_authors_checkpoint(second, tmp_path / "other"), tmp_path / "second", ConvertOptions(base=base)
    )
    for name, target in (("queries", "query_proj"), ("values", "value_proj")):
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, modules_to_save=[])
        peft.get_peft_model(load(base), config).save_pretrained(tmp_path / name)

    def together(*names: str, method: str = "linear") -> Any:
        weight = 0.6 if method == "linear" else 1.0
        return make_recipe([Ingredient(name, str(tmp_path / name), weight) for name in names], Settings(method=method))

    for names in (("first", "second"), ("first", "values")):
        merge(base, together(*names), tmp_path / names[1] / "merged")
        report = verify(base, together(*names), tmp_path / names[1] / "merged").as_json()
        assert report["passed"] is True, report["problems"]
    live = reference.authors_model(reference.pico_deberta())  # its layers with 0.6 of both deltas
    for name, layer in live.named_modules():
        if isinstance(layer, reference.SVDLinear):
            other = second.get_submodule(name)
            layer.more = [layer, *([other] if isinstance(other, reference.SVDLinear) else [])]
            layer.forward = lambda x, layer=layer: (
                torch.nn.Linear.forward(layer, x) + 0.6 * sum(x @ one.delta().to(x) for one in layer.more)
            )
    assert differs(load(tmp_path / "second" / "merged"), reference.double_logits(live)) < TOLERANCE
    for recipe in (together("first", "queries"), together("first", "second", method="in-turn")):
        with pytest.raises(InputError, match="query_proj"):
            merge(base, recipe, tmp_path / "out")
