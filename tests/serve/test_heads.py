"""Classifiers whose adapters have heads of their own: each request gets its adapter's, and the base keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trained import write_tokenizer
from world import RunEngine, prompts

from adapter_merge.errors import AdapterMergeError, UnsupportedError
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter, why_no_heads

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LABELS = 3
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def classifier(folder: Path) -> Any:
    """A random Qwen2 with a head of three labels."""
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen2ForSequenceClassification(
        transformers.Qwen2Config(
            hidden_size=128,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            intermediate_size=128,
            num_hidden_layers=2,
            vocab_size=512,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            num_labels=LABELS,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model.eval()


def adapted(base: Path, folder: Path, seed: int, labels: int = LABELS, **config: Any) -> Any:
    """PEFT's own live model for sequence classification, whose adapter and head are saved in `folder`."""
    import peft
    import transformers

    torch.manual_seed(seed)
    model: Any = transformers.Qwen2ForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True
    )
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=TARGETS, **config)
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    tuned.save_pretrained(folder)
    return tuned.eval()


def test_every_adapter_has_its_own_head(run_engine: RunEngine, tmp_path: Path) -> None:
    """LoRA, DoRA and a LoRA whose head is the base's, in one batch with the base, with every slot in use."""
    base = tmp_path / "base"
    live = {None: classifier(base)}
    made = Converter(base, Cache(tmp_path / "cache"))
    kinds: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "plain": {"modules_to_save": []}}
    folders = {}
    for seed, (name, config) in enumerate(kinds.items(), start=1):
        live[name] = adapted(base, tmp_path / name, seed, **config)
        folders[name] = made.obtain(tmp_path / name).folder
    several = prompts(3, 9)
    batch = [{"adapter": name, "prompt": prompt} for prompt in several for name in live]
    result = run_engine(base, folders, [batch, batch], {"max_loras": len(folders), "max_lora_rank": 8})
    for answers in result["answers"]:
        for request, answer in zip(batch, answers, strict=True):
            with torch.no_grad():
                wanted = live[request["adapter"]](torch.tensor([request["prompt"]])).logits[0].softmax(-1)
            torch.testing.assert_close(torch.tensor(answer["probabilities"]), wanted, rtol=0, atol=2e-5)
    differ = torch.tensor([[answer["probabilities"] for answer in result["answers"][0][:4]]])
    assert float(torch.pdist(differ[0]).min()) > 1e-2, "the heads are too alike for a mix-up to show"


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    classifier(base)
    adapted(base, tmp_path / "wide", 1, labels=5)
    with pytest.raises(AdapterMergeError, match="score"):
        Converter(base, Cache(tmp_path / "cache")).obtain(tmp_path / "wide")


def test_what_vllm_holds_for_one_adapter() -> None:
    assert why_no_heads([]) == why_no_heads(["score.weight"]) == why_no_heads(["classifier.weight", "classifier.bias"])
    for names in (
        ["classifier.dense.weight", "classifier.out_proj.weight"],
        ["score.weight", "classifier.weight"],
        ["classifier.bias"],
        ["lm_head.weight"],
        ["score.weight", "model.norm.weight"],
    ):
        assert "only for a classifier's head" in why_no_heads(names)


def test_an_adapted_head_is_refused(tmp_path: Path) -> None:
    """A LoRA of the head itself: vLLM's CPU kernels give the base the last slot's."""
    base = tmp_path / "base"
    classifier(base)
    import peft
    import transformers

    model: Any = transformers.Qwen2ForSequenceClassification.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "score"])).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match="adapts score"):
        Converter(base, Cache(tmp_path / "cache")).obtain(tmp_path / "a")
