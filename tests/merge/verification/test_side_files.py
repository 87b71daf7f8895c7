"""verify of a merged model whose weights are right and whose other files are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factor_models import peft_adapter, pico_model

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import UnsupportedError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    place = tmp_path_factory.mktemp("side-files")
    base = pico_model(place / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    adapter = peft_adapter(base, place / "adapter")
    merge(base, adapter, place / "merged", MergeOptions(device="cpu"))
    return base, adapter, place / "merged"


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
    file.write_text(json.dumps(content), "utf-8")


def edit(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, "utf-8") and None  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, problem, note",
    [
        (swap_tokens, "another vocabulary", "not the base's: tokenizer.json"),
        (
            edit("chat_template.jinja", "w9 {{ messages[0]['content'] }}"),
            "differently from the base",
            "chat_template.jinja",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded", "missing: tokenizer.json"),
        (edit("generation_config.json", '{"eos_token_id": 7}'), None, "not the base's: generation_config.json"),
        (edit("modeling_pico.py", "pass"), None, "does not have: modeling_pico.py"),
        (lambda folder: torch.save({}, folder / "pytorch_model.bin"), "no index names", None),
        (lambda folder: None, None, None),
    ],
    ids=["vocabulary", "template", "no tokenizer", "generation", "code", "weights", "nothing"],
)
def test_what_differs_beside_the_weights_is_said(
    spoil: Callable[[Path], None],
    problem: str | None,
    note: str | None,
    made: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    base, adapter, merged = made
    copy = shutil.copytree(merged, tmp_path / "copy")
    spoil(copy)
    report = verify(base, adapter, copy, VerifyOptions(generated=1))
    notes = report.as_json()["notes"]
    assert any(note in text for text in notes) if note else notes == []
    assert any(problem in text for text in report.problems) if problem else report.passed, report.problems


def test_a_model_without_logits_is_no_bug(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = made
    copy = shutil.copytree(merged, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}), "utf-8")
    with pytest.raises(UnsupportedError, match="LlamaModel computes no logits"):
        verify(base, adapter, copy, VerifyOptions(generated=1))
    assert not verify(base, adapter, copy, VerifyOptions(weights_only=True)).passed
