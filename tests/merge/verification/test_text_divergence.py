"""`merge --as same --texts`: KL to the unmerged adapter, against models that transformers and PEFT load themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from pico_bases import quiet, train
from quantised_bases import config_of, llama, quantised
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.cli import main
from adapter_merge.errors import InputError, ParityError
from adapter_merge.verification import text_divergence

WORDS = [f"w{index}" for index in range(96)]
TEXTS = ["w3 w4 w5 w90 w12", "w7", "w8 w8 w21 w30 w31 w95 w2 w60"]
Base = tuple[Path, dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """An INT4 base with a word tokenizer, its dequantised weights, and a LoRA."""
    place = tmp_path_factory.mktemp("base")
    folder, dense = quantised("W4A16", place / "int4", 128)
    with quiet():
        llama(128).save_pretrained(place / "plain")
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
        fast.save_pretrained(folder)
    train(place / "plain", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), place / "lora")
    return folder, dense, place / "lora"


def log_probabilities(model: Any, text: str) -> Tensor:
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    with torch.no_grad(), quiet():
        return model(ids).logits[0].double().log_softmax(-1)


def in_float32(folder: Path, weights: dict[str, Tensor]) -> Any:
    """The Llama of `folder` with `weights`, in float32."""
    with quiet():
        config = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.float().eval()


def loaded(folder: Path) -> Any:
    """The model that transformers loads with compressed-tensors, its dequantised weights in float32."""
    with quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
        model(torch.arange(4)[None])  # it decompresses in the first forward
    names = [name for name, _ in model.named_parameters() if not name.endswith(("_scale", "_shape"))]
    return in_float32(folder, {name: model.get_parameter(name).data for name in names})


def test_kl_is_that_of_the_models_that_transformers_loads(base: Base, tmp_path: Path) -> None:
    folder, dense, lora = base
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS))
    arguments = ["merge", str(folder), str(lora), "-o", str(tmp_path / "out"), "--as", "same", "--texts", str(texts)]
    result = CliRunner().invoke(main.group, arguments)
    assert result.exit_code == 0, result.output
    assert "on 3 texts (14 tokens): KL to the unmerged adapter" in result.output
    found = json.loads((tmp_path / "out" / "adapter_merge.json").read_text())["certificate"]["texts"]
    with quiet():
        live = peft.PeftModel.from_pretrained(in_float32(folder, dense), lora).eval()
    merged = loaded(tmp_path / "out")
    kl = kl_base = same = 0.0
    for text in TEXTS:
        p, q = log_probabilities(live, text), log_probabilities(merged, text)
        with live.disable_adapter():
            before = log_probabilities(live, text)
        kl += float((p.exp() * (p - q)).sum())
        kl_base += float((p.exp() * (p - before)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
    assert found["kl_base"] > found["kl"] > 0
    assert found["kl"] == pytest.approx(kl / 14, rel=1e-3)
    assert found["kl_base"] == pytest.approx(kl_base / 14, rel=1e-3)
    assert found["same_choice"] == pytest.approx(same / 14)
    assert (found["texts"], found["tokens"]) == (3, 14)


def test_chunks_give_the_same(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several lengths, padded together or one by one."""
    folder, _, lora = base
    options = MergeOptions(write_as="same", texts=TEXTS)
    whole = merge(folder, lora, tmp_path / "whole", options).as_json()["certificate"]["texts"]
    monkeypatch.setattr(text_divergence, "CHUNK_BYTES", 1)
    split = merge(folder, lora, tmp_path / "split", options).as_json()["certificate"]["texts"]
    assert split["kl"] == pytest.approx(whole["kl"], rel=1e-4)
    assert split["kl_base"] == pytest.approx(whole["kl_base"], rel=1e-4)


def test_refusals(base: Base, tmp_path: Path) -> None:
    folder, _, lora = base
    with pytest.raises(InputError, match="needs --as same"):
        merge(folder, lora, tmp_path / "out", MergeOptions(write_as="bfloat16", texts=TEXTS))
    with pytest.raises(InputError, match="contains no text"):
        merge(folder, lora, tmp_path / "out", MergeOptions(write_as="same", texts=[" "]))
    with pytest.raises(InputError, match="--finish"):
        merge(folder, lora, tmp_path / "out", MergeOptions(write_as="same", texts=TEXTS, part=(1, 2)))
    with pytest.raises(ParityError, match="quantised again") as raised:
        merge(folder, lora, tmp_path / "out", MergeOptions(write_as="same", texts=TEXTS, min_retention=1.0))
    assert "--as bfloat16" in str(raised.value.problems[0].hint)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no tokenizer"):
        merge(bare, lora, tmp_path / "out", MergeOptions(write_as="same", texts=TEXTS))
    assert not (tmp_path / "out").exists()
