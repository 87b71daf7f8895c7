"""export, generate and verify as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("onnxruntime_genai")

from adapter_merge.cli.main import group
from adapter_merge.errors import InputError, MismatchError
from adapter_merge.export import generation
from adapter_merge.export.checking.verification import verify_onnx
from adapter_merge.export.engine.prompting import Prompter, Sampling, limit_to_context

pytestmark = pytest.mark.onnx


def run(*arguments: Any, text: str | None = None) -> Result:
    return CliRunner().invoke(group, [str(argument) for argument in arguments], input=text)


@pytest.fixture(scope="module")
def folder(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "out"
    named = [f"{name}={adapters[name]}" for name in ("dude", "dcft")]
    result = run("export", pico, *named, "-o", output, "--mode", "switchable", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["adapters"]["dude"]["row_scaled"] == 14
    added = run("export", output, "--add", f"lora={adapters['lora']}")
    assert added.exit_code == 0, added.output
    assert "lora: 6 linears, rank 4" in added.stdout
    return output


@pytest.fixture(scope="module")
def batched(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "batched"
    named = [f"{name}={adapters[name]}" for name in ("dude", "dcft")]
    assert run("export", pico, *named, "-o", output, "--mode", "batched").exit_code == 0
    return output


@pytest.mark.slow
def test_both_engines_and_transformers_answer_alike(folder: Path, pico: Path, adapters: dict[str, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = ("base", "dude", "dcft", "dude")
    texts = {}
    for engine in ("genai", "onnxruntime"):
        answers = generation.generate(folder, "hello", names, sampling=Sampling(24), engine=engine)
        texts[engine] = [answer.text for answer in answers]
        assert [answer.adapter for answer in answers] == list(names)
    assert texts["genai"] == texts["onnxruntime"]
    assert texts["genai"][1] == texts["genai"][3] != texts["genai"][0]
    prompter = Prompter(folder)
    ids = prompter.encode("hello")
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), adapters["dude"]).eval()
    from adapter_merge.export.checking.verification import torch_greedy

    tokens = torch_greedy(model, ids, 24)
    stop = next((index for index, token in enumerate(tokens) if token in prompter.stops), len(tokens))
    assert texts["genai"][1] == prompter.tokenizer.decode(tokens[:stop], skip_special_tokens=True)


@pytest.mark.slow
def test_one_batch_answers_as_single_runs_do(folder: Path, batched: Path) -> None:
    names = ("dcft", "base", "dude")
    sampling = Sampling(24)
    single = [answer.text for answer in generation.generate(folder, "hello", names, sampling=sampling)]
    together = generation.generate(batched, "hello", names, sampling=sampling)
    assert [answer.text for answer in together] == single
    result = run("generate", batched, "--prompt", "-", "--adapter", "dcft", "--adapter", "base", text="hello")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"[dcft] {single[0]}"[:20])


def test_generate_streams_and_reports(folder: Path) -> None:
    result = run("generate", folder, "--prompt", "hi", "--adapter", "dude", "--max-tokens", 8, "--json")
    answer = json.loads(result.stdout)["answers"][0]
    assert answer["adapter"] == "dude"
    assert answer["tokens"] <= 8
    pieces: list[str] = []
    generation.generate(folder, "hi", ["dude"], sampling=Sampling(8), show=lambda adapter, text: pieces.append(text))
    assert len(pieces) > 1
    assert "".join(pieces) == answer["text"]


def test_sampling_is_seeded(folder: Path) -> None:
    def sample(seed: int) -> str:
        sampling = Sampling(16, temperature=1.5, top_p=0.9, seed=seed)
        return generation.generate(folder, "hi", ["dude"], sampling=sampling, engine="onnxruntime")[0].text

    assert sample(1) == sample(1) != sample(2)


def test_unknown_adapter_is_named_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(InputError, match="no adapter named nobody") as caught:
        generation.generate(folder, "hi", ["nobody"])
    assert caught.value.problems[0].expected == "base, dcft, dude, lora"


def test_genai_cannot_run_a_batched_export(batched: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime-genai cannot run"):
        generation.generate(batched, "hi", engine="genai")


@pytest.mark.parametrize("name", [None, "lora", "dude", "dcft"])
def test_verify(folder: Path, pico: Path, adapters: dict[str, Path], name: str | None) -> None:
    report = verify_onnx(pico, adapters[name] if name else None, folder)
    assert report["passed"] is True
    assert report["tokens"] >= 200
    assert report["decode_tokens"] >= 100
    assert report["logits"]["greedy_equal"] == report["tokens"]
    assert name is None or report["logits"]["effect"] > 100 * report["logits"]["max_difference"]


def test_verify_with_prompts_and_batched(batched: Path, pico: Path, adapters: dict[str, Path]) -> None:
    report = verify_onnx(pico, adapters["dude"], batched, prompts=["hello", "good bye"])
    assert report["passed"] is True
    assert report["adapter"] == "dude"
    assert report["decode_tokens"] == 128


def test_verify_fails_for_another_adapter_and_refuses_another_base(
    folder: Path, pico: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = verify_onnx(pico, adapters["lora"], folder, name="dude")
    assert report["passed"] is False
    assert "max |dlogit|" in report["problems"][0]
    from pico_models import save_pico

    with pytest.raises(MismatchError, match="not an export of"):
        verify_onnx(save_pico(tmp_path / "other", "llama", seed=5), None, folder)


def test_verify_on_the_command_line(folder: Path, pico: Path, adapters: dict[str, Path]) -> None:
    good = run("verify", pico, adapters["dcft"], folder)
    assert good.exit_code == 0, good.output
    assert good.stdout.endswith("PASS\n")


def test_names_of_adapters_become_file_names(pico: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    result = run(
        "export", pico, f"../x={adapters['lora']}", "base=y", "z", "-o", tmp_path / "o", "--mode", "switchable"
    )
    assert isinstance(result.exception, InputError)
    assert len(result.exception.problems) == 3
    assert not (tmp_path / "o").exists()


def test_dry_run_writes_nothing(pico: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for mode in ("merged", "switchable", "batched"):
        result = run("export", pico, f"a={adapters['dude']}", "-o", tmp_path / "o", "--mode", mode, "--dry-run")
        assert result.exit_code == 0, result.output
    assert not any(tmp_path.iterdir())


def test_a_prompt_longer_than_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="too long"):
        generation.generate(folder, "x" * 600)
    assert limit_to_context(folder, 500, Sampling(128)).max_tokens == 12
