"""What an export refuses before it merges or builds anything, and how errors of the libraries are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import VOCABULARY, save_pico, save_tokenizer

pytest.importorskip("onnxruntime_genai")

from adapter_merge.errors import AdapterMergeError, UnsupportedError
from adapter_merge.export.building.child_process import first_cause
from adapter_merge.export.exporting import export_model

pytestmark = pytest.mark.onnx


@pytest.fixture
def base(pico: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico, tmp_path / "base"))


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def no_merge(*_: Any, **__: Any) -> None:
    raise AssertionError("merged before it was refused")


def test_a_base_without_a_tokenizer(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_merge.api.merge.merge", no_merge)
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UnsupportedError, match="no tokenizer") as caught:
        export_model(base, {"a": adapters["dora"]}, tmp_path / "out")
    assert "tokenizer.json" in str(caught.value.problems[0].expected)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="cannot open its tokenizer"):
        export_model(base, {"a": adapters["dora"]}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_type": "yarn", "factor": 0}, "factor: a number above 0"),
        ({"rope_type": "linear", "factor": "2"}, "factor: a number above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "original_max_position"),
    ],
)
def test_rotary_settings_that_no_formula_takes(
    base: Path, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    change(base, rope_parameters={"rope_theta": 10000.0, **settings})
    with pytest.raises(UnsupportedError) as caught:
        export_model(base, {}, tmp_path / "out")
    assert [expected in str(problem.expected) for problem in caught.value.problems] == [True]


def test_longrope_of_transformers_5(tmp_path: Path) -> None:
    """rope_parameters, flat, with the original length inside; its factors are counted."""
    base = save_pico(tmp_path / "base", "phi3")
    factors = [1.0 + index / 8 for index in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    change(base, rope_parameters={**rope, "short_factor": factors, "long_factor": factors})
    with pytest.raises(UnsupportedError) as caught:  # pico_models says 512 outside
        export_model(base, {}, tmp_path / "out")
    assert [problem.got for problem in caught.value.problems] == ["128"]
    change(base, original_max_position_embeddings=128)
    change(base, rope_parameters={**rope, "short_factor": factors[:5], "long_factor": factors})
    with pytest.raises(UnsupportedError) as caught:
        export_model(base, {}, tmp_path / "out")
    assert [problem.expected for problem in caught.value.problems] == ["short_factor: 8 numbers above 0"]
    change(base, rope_parameters={**rope, "short_factor": factors, "long_factor": factors[::-1]})
    report = export_model(base, {}, tmp_path / "out")
    assert report["parity"]["base"]["max_difference"] < 1e-4 and report["parity"]["base"]["past_context"]


@pytest.mark.parametrize("labels", [1, 3])
def test_question_answering_with_other_heads(tmp_path: Path, labels: int) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForQuestionAnswering(BertConfig(vocab_size=VOCABULARY, num_labels=labels, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    save_tokenizer(tmp_path / "base")
    with pytest.raises(UnsupportedError, match=f"{labels} outputs per token"):
        export_model(tmp_path / "base", {}, tmp_path / "out")


def test_an_error_of_the_builder_is_one_line_about_the_model(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(base, hidden_act="weird")
    with pytest.raises(AdapterMergeError) as caught:
        export_model(base, {"a": adapters["dora"]}, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.cause.endswith(str(base)) and problem.got == (
        "'weird' is missing in the configuration or the weights"
    )
    assert ".tmp" not in str(problem) and "merged" not in str(problem)
    assert not (tmp_path / "out").exists()


def test_the_first_cause_of_a_chain() -> None:
    def outer() -> None:
        try:
            torch.zeros(2).reshape(3)
        except RuntimeError as error:
            raise ValueError("(Refer to the full stack trace above for more information.)") from error

    with pytest.raises(ValueError) as caught:
        outer()
    assert first_cause(caught.value) == "RuntimeError: shape '[3]' is invalid for input of size 2"
    assert first_cause(ZeroDivisionError("division by zero")).startswith("division by zero: a size")


@pytest.mark.parametrize(("kind", "size"), [("llama", 24), ("qwen3", 20)])
def test_heads_that_onnxruntime_does_not_run(kind: str, size: int, tmp_path: Path) -> None:
    base = save_pico(tmp_path / "base", kind, head_dim=size)
    with pytest.raises(UnsupportedError, match=f"heads of {size} numbers") as caught:
        export_model(base, {}, tmp_path / "out")
    assert caught.value.problems[0].expected == "a multiple of 16"


@pytest.mark.parametrize(
    ("architecture", "named"),
    [("Qwen3MoeForCausalLM", "Qwen2ForCausalLM, Qwen3ForCausalLM"), ("MambaForCausalLM", "another model")],
)
def test_a_refusal_names_what_is_near(base: Path, tmp_path: Path, architecture: str, named: str) -> None:
    change(base, architectures=[architecture])
    with pytest.raises(UnsupportedError) as caught:
        export_model(base, {}, tmp_path / "out")
    expected = str(caught.value.problems[0].expected)
    assert expected.startswith(named) and "Gemma" not in expected
