"""Encoders with their heads and GPT-2: torch.onnx, merged and switchable, against PEFT and the DCFT forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_models import save_encoder, save_encoder_adapter, save_encoder_dcft, save_gpt2, save_lora

pytest.importorskip("onnxruntime")

from adapter_merge.errors import MismatchError, UnsupportedError
from adapter_merge.export.adding import add_adapters
from adapter_merge.export.checking.verification import verify_onnx
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.engine.encoder_session import Classifier
from adapter_merge.export.exporting import export_model
from adapter_merge.export.folder.contents import read_export
from adapter_merge.export.graph.adapter_file import aligned, match_factors
from adapter_merge.export.graph.factor_folder import Factors, LinearFactors
from adapter_merge.export.graph.targets import Layout, ModuleSlice, Target

pytestmark = pytest.mark.onnx
BAR = 1e-4
TOKENS = {"prompt": [(37 * i + 11) % 250 for i in range(40)], "rest": [7 * i % 250 for i in range(20)]}


Exporter = Callable[[str], tuple[Path, dict[str, Path], Path]]


def batch(length: int) -> tuple[Any, Any]:
    ids = (np.arange(3 * length).reshape(3, length) * 37) % 300 + 5
    mask = np.ones_like(ids)
    mask[1, length - 3 :] = 0
    ids[mask == 0] = 1
    return ids, mask


def torch_logits(model: Any, ids: Any, mask: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    return result


def load(base: Path, adapter: Path | None) -> Any:
    from transformers import AutoModelForSequenceClassification

    if adapter is None:
        return AutoModelForSequenceClassification.from_pretrained(base).double().eval()
    if (adapter / "merged").is_dir():  # DCFT: the fixture wrote the dense model, from the formula
        return AutoModelForSequenceClassification.from_pretrained(adapter / "merged").double().eval()
    from peft import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().double().eval()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """A function from a family to its base, adapters and switchable export with two of them; each made once."""
    made: dict[str, tuple[Path, dict[str, Path], Path]] = {}

    def export(family: str) -> tuple[Path, dict[str, Path], Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = save_encoder(root / "base", family, layers=1 if family == "roberta" else 2)  # names as BERT's
            adapters = {
                "dora": save_encoder_adapter(base, root / "dora", 1, use_dora=True),
                "dcft": save_encoder_dcft(base, root / "dcft", 2),
                "later": save_encoder_adapter(base, root / "later", 3),
            }
            first = {name: adapters[name] for name in ("dora", "dcft")}
            export_model(base, first, root / "out", mode="switchable")
            made[family] = (base, adapters, root / "out")
        return made[family]

    return export


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_switchable_classifier(family: str, classifier: Exporter) -> None:
    base, adapters, output = classifier(family)
    graph = (output / "onnx" / "model.onnx").read_bytes()
    add_adapters(output, {"later": adapters["later"]})
    assert (output / "onnx" / "model.onnx").read_bytes() == graph
    session = Classifier(output, threads=1)
    answers: dict[str | None, Any] = {}
    for name in ("dora", None, "dcft", "later", None):
        model = load(base, adapters[name] if name else None)
        for length in (12, 70):
            ids, mask = batch(length)
            got = session.run(ids, mask, name)["logits"]
            expected = torch_logits(model, ids, mask)
            assert float((torch.from_numpy(got).double() - expected).abs().max()) < BAR
            answers[name] = got
    assert all(np.abs(answers[name] - answers[None]).max() > 0.05 for name in adapters)
    assert verify_onnx(base, adapters["dcft"], output, name="dcft")["passed"] is True


@pytest.mark.slow(first=False)
@pytest.mark.parametrize("family", ["roberta", "deberta-v2"])
def test_merged_classifier(family: str, tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", family, layers=1)
    dcft = save_encoder_dcft(base, tmp_path / "dcft", 2)
    export_model(base, {"dcft": dcft}, tmp_path / "out", mode="merged")
    ids, mask = batch(30)
    got = Classifier(tmp_path / "out", threads=1).run(ids, mask)["logits"]
    assert float((torch.from_numpy(got).double() - torch_logits(load(base, dcft), ids, mask)).abs().max()) < BAR
    report = verify_onnx(base, dcft, tmp_path / "out")
    assert report["passed"] is True
    assert report["logits"]["max_difference"] < BAR < report["logits"]["effect"]
    assert read_export(tmp_path / "out").kind == "encoder"


@pytest.mark.slow
def test_verify_sees_a_wrong_adapter(classifier: Exporter) -> None:
    base, adapters, output = classifier("roberta")
    assert verify_onnx(base, adapters["dora"], output)["passed"] is True
    assert verify_onnx(base, adapters["dora"], output, name="dcft")["passed"] is False
    assert verify_onnx(base, None, output)["passed"] is True


@pytest.mark.slow
def test_question_answering(tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    base = save_encoder(tmp_path / "base", "deberta-v2", task="QuestionAnswering", layers=1)
    export_model(base, {}, tmp_path / "out", mode="switchable")
    ids, mask = batch(20)
    got = Classifier(tmp_path / "out", threads=1).run(ids, mask)
    model = AutoModelForQuestionAnswering.from_pretrained(base).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    for key in ("start_logits", "end_logits"):
        assert float((torch.from_numpy(got[key]) - expected[key]).abs()[torch.from_numpy(mask) == 1].max()) < BAR


@pytest.mark.slow
def test_gpt2(tmp_path: Path, reference: Any) -> None:
    base = save_gpt2(tmp_path / "base")
    targets = ["c_attn", "c_fc", "c_proj"]
    lora = save_lora(base, tmp_path / "lora", 1, target_modules=targets, fan_in_fan_out=True)
    dora = save_lora(base, tmp_path / "dora", 2, target_modules=targets, fan_in_fan_out=True, use_dora=True)
    export_model(base, {"lora": lora, "dora": dora}, tmp_path / "s", mode="switchable")
    export_model(base, {"dora": dora}, tmp_path / "m", mode="merged")
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    decoder = Decoder(tmp_path / "s", threads=1)
    for name, adapter in ((None, None), ("lora", lora), ("dora", dora)):
        got = torch.from_numpy(run_all(decoder, name, TOKENS)).double()
        assert float((got - reference(base, adapter, tokens)).abs().max()) < BAR
    got = torch.from_numpy(run_all(Decoder(tmp_path / "m", threads=1), None, TOKENS)).double()
    assert float((got - reference(base, dora, tokens)).abs().max()) < BAR


def test_what_a_trace_cannot_do_is_said_first(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "bert")
    with pytest.raises(UnsupportedError) as caught:
        export_model(base, {}, tmp_path / "out", mode="switchable", precision="int4")
    assert "cannot be exported in int4" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_factors_for_tokens_alone_need_a_product_of_their_own() -> None:
    """Two products of query_proj: an export that feeds both, and factors that do not say which they are for."""
    module = "deberta.encoder.layer.0.attention.self.query_proj"
    linear = LinearFactors(np.zeros((2, 8), np.float32), np.zeros((8, 2), np.float32))

    def target(name: str, *nodes: str) -> Target:
        return Target(name, nodes, 8, 8, (ModuleSlice(name, 0, 8),))

    together = Layout("switchable", "b", "fp32", "float32", (target(module, "one", "two"),), {})
    apart = Layout(
        "switchable", "b", "fp32", "float32", (target(module, "one"), target(f"{module}.positions", "two")), {}
    )
    plain = Factors(Path("lora"), {module: linear}, {}, "LoRA")
    frozen = Factors(Path("dcft"), {module: linear}, {}, "DCFT", frozen_positions=True)
    assert set(aligned(plain, apart).linears) == {module, f"{module}.positions"}
    assert set(aligned(frozen, apart).linears) == set(aligned(plain, together).linears) == {module}
    for factors, layout in ((plain, together), (plain, apart), (frozen, apart)):
        match_factors(factors, layout)
    with pytest.raises(MismatchError, match="for tokens only"):
        match_factors(frozen, together)
    with pytest.raises(MismatchError, match="do not state"):
        match_factors(replace(frozen, frozen_positions=False), apart)
