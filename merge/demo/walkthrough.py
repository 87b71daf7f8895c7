"""All steps on a real small model: base, two trained adapters, merge, delta, factor, verify."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import check, verify
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.outputs.staging import check_output
from adapter_merge.storage.checkpoint import open_checkpoint
from adapter_merge.verification.live_adapter import load_model, quiet_libraries, require
from adapter_merge.verification.live_model import trained_model

from .smollm2 import obtain_base

ADAPTERS = ("dcft-pirate", "dude-json")
QUESTIONS = ("What is the capital of Italy?", "What is gravity?")
ANSWER_TOKENS = 40


def adapter_folder(name: str) -> Path:
    """Return the folder of the adapter `name`, which the package contains."""
    return Path(__file__).parent / "adapters" / name


def generate_answers(model: Any, tokenizer: Any, questions: tuple[str, ...] = QUESTIONS) -> list[str]:
    """Return the model's greedy answer to each question."""
    import torch

    texts = []
    for question in questions:
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad(), quiet_libraries():
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=ANSWER_TOKENS,
                pad_token_id=0,
            )
        texts.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def run(output: Path, base: str | None, overwrite: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all steps and return the figures. Files: output/base (kept between runs), output/<adapter>/<artefact>.

    say: called with a text for each step. Raises ParityError where an artefact does not compute what was trained.
    """
    require("transformers", "peft", *(() if base else ("gguf",)), extra="demo")
    given = open_checkpoint(base).folder if base is not None else None  # checked before a library takes it for a hub id
    import transformers

    started = time.perf_counter()
    for name in ADAPTERS:
        for artefact in ("merged", "factors", "delta"):
            check_output(output / name / artefact, overwrite)
    say("base: SmolLM2-135M-Instruct" if base is None else f"base: {base}")
    folder = given or obtain_base(output / "base")
    with quiet_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    report: dict[str, Any] = {"base": str(folder), "questions": list(QUESTIONS), "adapters": {}}
    report["answers"] = generate_answers(load_model(folder).float(), tokenizer)
    for name in ADAPTERS:
        adapter = adapter_folder(name)
        place = output / name
        say(f"{name}: as trained, then merge, delta, factor")
        entry: dict[str, Any] = {"adapter": str(adapter)}
        entry["answers"] = generate_answers(trained_model(open_pair(folder, adapter)), tokenizer)
        merge(folder, adapter, place / "merged", MergeOptions(overwrite=overwrite))
        delta(folder, adapter, place / "delta", DeltaOptions(overwrite=overwrite))
        factor(folder, adapter, place / "factors", FactorOptions(overwrite=overwrite))
        entry["merged_answers"] = generate_answers(load_model(place / "merged"), tokenizer)
        for artefact in ("merged", "factors"):
            say(f"{name}: verify {artefact}")
            verification = verify(folder, adapter, place / artefact, VerifyOptions(prompts=QUESTIONS, generated=24))
            check(verification)
            outcome = verification.as_json()
            exact = outcome.get("logits_float64", {}).get("max_difference")
            entry[artefact] = {"path": str(place / artefact), **outcome["logits"], "float64": exact}
        report["adapters"][name] = entry
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report
