"""The certificate end to end against PEFT on both sides; calibration; cards that the hub accepts."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from factor_models import (
    WORDS,
    base_weights,
    dcft_adapter,
    factor_products,
    load,
    merged_weights,
    peft_adapter,
    peft_model,
    pico_model,
)

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, read_prompts
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import InputError
from adapter_merge.factoring.calibration import LEAST, SHRINKAGE, collect, square_root
from adapter_merge.factoring.end_to_end import compare, compute_logits, measure_figures
from adapter_merge.outputs.model_card import card, is_hub_name, merged_card

PROMPTS = ["w1 w2 w3 w4", "w9 w8 w7"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def dude(base: Path) -> Path:
    return peft_adapter(base, base.parent / "dude", use_dora=True, init_lora_weights="pissa")


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    """Text of few words, so that the activations are far from white."""
    source = torch.Generator().manual_seed(0)
    file = base.parent / "text.txt"
    file.write_text(" ".join(WORDS[3 + int(torch.randint(12, (), generator=source))] for _ in range(700)))
    return file


@pytest.mark.parametrize("settings", [{}, {"rank": 3}, {"rank": 2, "keep_scale": True}])
def test_the_figures_are_those_of_peft_on_both_sides(
    settings: dict[str, int], base: Path, dude: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    content = factor(base, dude, folder, FactorOptions(prompts=PROMPTS, **settings)).as_json()  # type: ignore[arg-type]
    found = content["certificate"]["end_to_end"]
    live, loaded = peft_model(base, dude).float(), peft_model(base, folder).float()
    differences, divergences, equal = [], [], 0
    for prompt in PROMPTS:
        ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
        path = live.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        with torch.no_grad():
            want, got = live(input_ids=path).logits[0].double(), loaded(input_ids=path).logits[0].double()
        differences.append((want - got).abs())
        divergences.append((want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1))
        start = ids.shape[1] - 1
        equal += int((want.argmax(-1) == got.argmax(-1))[start:].sum())
    assert found["max_dlogit"] == pytest.approx(max(float(part.max()) for part in differences), abs=2e-5, rel=1e-3)
    mean = torch.cat([part.reshape(-1) for part in differences]).mean()
    assert found["mean_dlogit"] == pytest.approx(float(mean), abs=5e-6, rel=1e-3)
    assert found["mean_kl"] == pytest.approx(float(torch.cat(divergences).mean()), abs=1e-6, rel=1e-3)
    assert found["greedy_equal"] == equal
    assert found["texts"] == 2 and found["effect"] > 0.1
    exact = not settings
    assert (found["max_dlogit"] < 1e-4) == exact
    assert (found["greedy_equal"] == found["greedy_total"]) == exact or not exact
    assert (found["perplexity"]["factors"] == pytest.approx(found["perplexity"]["trained"], rel=1e-5)) == exact


def test_figures_of_a_known_difference() -> None:
    want = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    got = want + torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    path = torch.tensor([[0, 1, 2]])
    found = measure_figures([path], [0], [want], [got], [torch.zeros_like(want)], generative=True)
    assert found["max_dlogit"] == 2 and found["mean_dlogit"] == pytest.approx(2 / 9)
    assert (found["greedy_equal"], found["greedy_total"], found["texts_equal"]) == (2, 3, 0)
    assert found["effect"] == 3
    p, q = want[0].softmax(-1), got[0].softmax(-1)
    assert found["mean_kl"] == pytest.approx(float((p * (p / q).log()).sum()) / 3, rel=1e-4)
    losses = [-float(want[0].log_softmax(-1)[1]), -float(want[1].log_softmax(-1)[2])]
    assert found["perplexity"]["trained"] == pytest.approx(2.718281828 ** (sum(losses) / 2), rel=1e-4)
    assert found["perplexity"]["base"] == pytest.approx(3, rel=1e-4)


def test_a_dcft_adapter_is_certified_against_its_own_formula(base: Path, tmp_path: Path) -> None:
    adapter = dcft_adapter(base, tmp_path / "dcft")
    found = factor(base, adapter, tmp_path / "out", FactorOptions(end_to_end=True)).as_json()["certificate"][
        "end_to_end"
    ]
    assert found["max_dlogit"] < 1e-4 < found["effect"]
    assert found["texts_equal"] == found["texts"] == 4


def test_a_classifier_with_a_trained_head_is_certified(tmp_path: Path) -> None:
    import peft
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=2, target_modules=["query", "dense"], exclude_modules=r".*pooler.*", task_type="SEQ_CLS"
    )
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "classifier" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    found = factor(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", FactorOptions(end_to_end=True)).as_json()
    end = found["certificate"]["end_to_end"]
    assert end["max_dlogit"] < 1e-5 < 0.05 < end["effect"]
    assert end["greedy_equal"] == end["greedy_total"] == end["positions"] == 4
    assert end["perplexity"] is None
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    assert "as a LoRA, since heads" in (tmp_path / "out" / "README.md").read_text()
    worse = factor(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "worse", FactorOptions(rank=1, end_to_end=True)
    ).as_json()
    assert worse["certificate"]["end_to_end"]["max_dlogit"] > 1e-3


def test_the_factors_read_back_are_the_ones_that_count(base: Path, dude: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    factor(base, dude, tmp_path / "out")
    file = tmp_path / "out" / "row_scale.safetensors"
    save_file({name: tensor * 1.05 for name, tensor in load_file(file).items()}, file)
    assert compare(open_pair(base, dude), tmp_path / "out", PROMPTS)["max_dlogit"] > 1e-2


# -- calibration ---------------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs(base: Path, dude: Path, text: Path) -> None:
    moments = collect(open_pair(base, dude), text)
    live = peft_model(base, dude).float()
    name = "model.layers.1.mlp.down_proj"
    rows = []
    live.get_submodule(f"base_model.model.{name}").register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    ids = torch.tensor([[WORDS.index(word) for word in text.read_text().split()]])
    with torch.no_grad():
        for start in range(0, ids.shape[1], 256):
            live(input_ids=ids[:, start : start + 256])
    x = torch.cat([row.reshape(-1, 96) for row in rows]).double()
    moment = x.T @ x / len(x)
    assert moments.tokens == len(x) == 700
    assert torch.allclose(moments.moments[name].double(), moment, atol=1e-5 * float(moment.abs().max()))
    root = moments.root(name)
    assert root is not None
    shrunk = moment + SHRINKAGE * moment.diagonal().mean() * torch.eye(96)
    assert torch.allclose(root.double() @ root.double().T, shrunk, atol=1e-4 * float(moment.abs().max()))
    attention = "model.layers.0.self_attn."
    assert moments.sources[attention + "v_proj"] == moments.sources[attention + "q_proj"]
    assert moments.root("model.embed_tokens") is None


@pytest.mark.parametrize("settings", [{"rank": 3}, {"budget": 0.03}, {"rank": 2, "keep_scale": True}])
def test_calibration_lowers_the_error_of_the_output(
    settings: dict[str, float], base: Path, dude: Path, text: Path, tmp_path: Path
) -> None:
    factor(base, dude, tmp_path / "plain", FactorOptions(**settings))  # type: ignore[arg-type]
    content = factor(base, dude, tmp_path / "calibrated", FactorOptions(calibrate=text, **settings)).as_json()  # type: ignore[arg-type]
    assert content["calibration"]["tokens"] == 700
    before, after = base_weights(base), merged_weights(base, dude)
    moments = collect(open_pair(base, dude), text)
    lost = {"plain": 0.0, "calibrated": 0.0}
    for kind in lost:
        got = merged_weights(base, tmp_path / kind)
        for name, line in content["layers"].items():
            root = moments.root(name)
            assert root is not None
            error = torch.linalg.vector_norm((got[name] - after[name]) @ root.double())
            whole = torch.linalg.vector_norm((after[name] - before[name]) @ root.double())
            lost[kind] += float(error / whole) if "budget" not in settings else float(error**2)
            if kind == "calibrated":
                assert line["output_error"] == pytest.approx(float(error / whole), rel=5e-3)
    assert lost["calibrated"] < 0.95 * lost["plain"]


def test_calibrated_factors_are_the_best_for_the_output(base: Path, dude: Path, text: Path, tmp_path: Path) -> None:
    factor(base, dude, tmp_path / "out", FactorOptions(rank=4, calibrate=text))
    before, after = base_weights(base), merged_weights(base, dude)
    moments = collect(open_pair(base, dude), text)
    for name, product in factor_products(tmp_path / "out").items():
        root = moments.root(name)
        assert root is not None
        weighted = (after[name] - before[name]) @ root.double()
        best = float(torch.linalg.vector_norm(torch.linalg.svdvals(weighted)[4:]))
        assert float(torch.linalg.vector_norm(weighted - product @ root.double())) <= 1.01 * best


def test_calibration_text_must_be_text_and_enough(base: Path, dude: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(InputError, match="too little text") as caught:
        factor(base, dude, tmp_path / "out", FactorOptions(rank=2, calibrate=tmp_path / "short.txt"))
    assert str(LEAST) in str(caught.value)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81" * 100)
    with pytest.raises(InputError, match="not a text file"):
        factor(base, dude, tmp_path / "out", FactorOptions(rank=2, calibrate=tmp_path / "binary"))
    assert not (tmp_path / "out").exists()


def test_a_moment_of_nothing_still_has_a_root() -> None:
    assert torch.isfinite(square_root(torch.zeros(4, 4))).all()


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(tmp_path / "empty.txt")


# -- cards ---------------------------------------------------------------------------------------------


def metadata(file: Path) -> dict[str, object]:
    from huggingface_hub import ModelCard

    found: dict[str, object] = ModelCard.load(file).data.to_dict()
    return found


@pytest.mark.parametrize("settings, scaled", [({}, True), ({"rank": 5}, False)])
def test_the_card_of_factors(
    settings: dict[str, int], scaled: bool, base: Path, dude: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((dude / "adapter_config.json").read_text())
    adapter = tmp_path / "named"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes((dude / "adapter_model.safetensors").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/pico"}))
    factor(base, adapter, tmp_path / "out", FactorOptions(**settings))  # type: ignore[arg-type]
    data = metadata(tmp_path / "out" / "README.md")
    assert data["base_model"] == "org/pico" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert isinstance(data["tags"], list)
    assert ("dora" in data["tags"]) == scaled and ("lora" in data["tags"]) == (not scaled)
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("vllm serve" in text) == (not scaled) and ("adapter-merge serve" in text) == scaled
    if not scaled:
        assert "--max-lora-rank 8 " in text  # 5 is none of vLLM's ranks
    certificate = json.loads((tmp_path / "out" / "adapter_merge.json").read_text())["certificate"]
    assert f"{certificate['max_relative_error']:.3g}" in text
    # what the card tells to do works
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(code.replace('"org/pico"', repr(str(base))), scope)
    assert type(scope["model"]).__name__ == "PeftModelForCausalLM"


def test_a_path_is_no_base_model(tmp_path: Path) -> None:
    assert is_hub_name("org/model") and not is_hub_name(str(tmp_path)) and not is_hub_name("model")
    assert not is_hub_name(None)
    (tmp_path / "README.md").write_text(card("x", str(tmp_path), "merge", "transformers", ["a"], "body"))
    assert "base_model" not in metadata(tmp_path / "README.md")


def test_the_card_of_a_merged_model(base: Path, dude: Path, tmp_path: Path) -> None:
    merge(base, dude, tmp_path / "merged")
    data = metadata(tmp_path / "merged" / "README.md")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "AutoModelForCausalLM" in (tmp_path / "merged" / "README.md").read_text()
    content = {"base": {"name": "org/b"}, "adapters": [], "versions": {"adapter-merge": "1"}}
    text = merged_card(content, "t", {"architectures": ["DebertaV2ForSequenceClassification"]})
    assert "AutoModelForSequenceClassification" in text and "base_model_relation: merge" in text
    assert "vllm serve" not in text


def test_logits_of_a_plain_model(base: Path) -> None:
    model = load(base)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(compute_logits(model, ids), model(input_ids=ids).logits[0].detach().float())


def test_hostile_names_stay_text_in_a_card() -> None:
    """A folder, an adapter and a base whose names are markup, YAML, Python or shell code."""
    name = 'a"); import os  #\n---\ntags: [x]\n<script>|```$(id)`'
    entry = {"name": name, "method": "LoRA", "modules": 1, "sha256": "0" * 64}
    content = {"base": {"name": name}, "adapters": [entry], "versions": {"adapter-merge": "1"}}
    text = merged_card(content, name, {"architectures": ["LlamaForCausalLM"]})
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["tags"] == ["adapter-merge", "merge"]
    prose, *blocks = body.split("````")
    assert "<script>" not in prose.replace("\\<", "") and prose.count("\n# ") == 0
    python = next(block for block in blocks if block.startswith("python\n")).removeprefix("python\n")
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [name]
    shell = next(block for block in blocks if block.startswith("bash\n"))
    assert shlex.split(shell.removeprefix("bash\n"), comments=True)[2] == name
