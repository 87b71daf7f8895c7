"""README.md of an export: its programs run as they stand, and print what the live model with the adapter generates."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_models import add_dcft, save_encoder, save_encoder_adapter, save_gpt2, save_lora, save_pico

pytest.importorskip("onnxruntime_genai")

from adapter_merge.export.adding import add_adapters
from adapter_merge.export.exporting import export_model

pytestmark = pytest.mark.onnx
NEW = 20
PROMPTS = ("Hello, world", "A prompt of another length")


def programs(folder: Path) -> list[str]:
    text = (folder / "README.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(folder: Path, program: str) -> str:
    """The output of the program, run in `folder`; it must not import this package."""
    assert "adapter_merge" not in program
    shown = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(shown):
        exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    return shown.getvalue()


def front_matter(folder: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    return dict(metadata_load(folder / "README.md") or {})


def greedy(base: Path, adapter: Path | None, prompt: str) -> list[int]:
    """NEW greedy tokens of transformers (and PEFT, or the DCFT's delta) in float32."""
    import json

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        if config["peft_type"] == "DCFT":
            add_dcft(model, adapter, config)
        else:
            model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(base)(prompt)["input_ids"]
    found: list[int] = []
    for _ in range(NEW):
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
    return found


def by_transformers(folder: Path, rows: list[list[int]]) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return "".join(f"{tokenizer.decode(row)}\n" for row in rows)


def by_genai(folder: Path, row: list[int]) -> str:
    import onnxruntime_genai as og

    if 257 in row:
        row = row[: row.index(257)]
    return str(og.Tokenizer(og.Model(str(folder))).decode(np.asarray(row, np.int32)))


def test_switchable(pico: Path, adapters: dict[str, Path], switchable: Path) -> None:
    genai, plain = programs(switchable)
    assert '"lora"' in genai
    expected = [greedy(pico, adapters["lora"], prompt) for prompt in PROMPTS]
    assert expected[0] != greedy(pico, None, PROMPTS[0])
    assert run(switchable, plain) == by_transformers(switchable, expected)
    assert run(switchable, genai).rstrip("\n") == by_genai(switchable, expected[0])
    base = "\n".join(line for line in genai.splitlines() if "set_active_adapter" not in line)
    assert run(switchable, base).rstrip("\n") == by_genai(switchable, greedy(pico, None, PROMPTS[0]))
    assert front_matter(switchable)["max_logit_difference"]["lora"] < 1e-3


@pytest.mark.slow
def test_batched(pico: Path, adapters: dict[str, Path], batched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(batched, folder)
    (program,) = programs(folder)
    expected = [greedy(pico, adapters["lora"], PROMPTS[0]), greedy(pico, None, PROMPTS[1])]
    assert run(folder, program) == by_transformers(folder, expected)
    other = program.replace("adapter_ids = np.array([1, 0])", "adapter_ids = np.array([2, 0])")
    assert other != program
    assert run(folder, other).splitlines()[0] == by_transformers(
        folder, [greedy(pico, adapters["dcft"], PROMPTS[0])]
    ).rstrip("\n")
    add_adapters(folder, {"dora": adapters["dora"]})
    assert "| dora | `adapter_ids` 3 |" in (folder / "README.md").read_text()


def test_sliding_window_with_a_hostile_name(tmp_path: Path) -> None:
    """The base's name and licence come from its folder; what they hold is text in the card and in its metadata."""
    name = "b`a[s]e'\"<img src=x>:|# $(id)"
    base = save_pico(tmp_path / name, "mistral-window")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    lora = save_lora(base, tmp_path / "lora", 3)
    folder = tmp_path / "out"
    export_model(base, {"de": lora}, folder)
    genai, plain = programs(folder)
    expected = greedy(base, lora, PROMPTS[0])
    assert run(folder, plain) == by_transformers(folder, [expected])
    assert run(folder, genai).rstrip("\n") == by_genai(folder, expected)
    said = front_matter(folder)
    assert said["license"] == "apache-2.0" and set(said["max_logit_difference"]) == {"merged"}
    text = (folder / "README.md").read_text()
    assert "<img" not in text.replace("\\<img", "") and "| de | in the weights | lora |" in text


@pytest.mark.slow
def test_gpt2(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path / "gpt2")
    lora = save_lora(base, tmp_path / "lora", 3, target_modules=["c_attn"], fan_in_fan_out=True)
    export_model(base, {"de": lora}, tmp_path / "out", mode="switchable")
    (program,) = programs(tmp_path / "out")
    expected = [greedy(base, lora, prompt) for prompt in PROMPTS]
    assert run(tmp_path / "out", program) == by_transformers(tmp_path / "out", expected)


@pytest.mark.slow
def test_classifier(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = save_encoder(tmp_path / "bert", "bert")
    adapter = save_encoder_adapter(base, tmp_path / "adapter", 3)
    export_model(base, {"mood": adapter}, tmp_path / "out", mode="switchable")
    (program,) = programs(tmp_path / "out")
    printed = run(tmp_path / "out", program).strip().removeprefix("logits ")
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter).eval()
    batch = AutoTokenizer.from_pretrained(base)(
        ["Hello, world", "A text of another length"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
    assert np.abs(np.array(ast.literal_eval(printed)) - expected).max() < 1e-4
    assert front_matter(tmp_path / "out")["pipeline_tag"] == "text-classification"
