"""The demo's adapters on a SmolLM2-135M of every quantisation scheme: merged in each way, beside the unmerged adapter.

    python benchmarks/quantised_retention.py SCRATCH [--schemes NAME ...] [--adapters NAME ...] [--questions N]

SCRATCH holds the quantised bases (0.1 to 0.4 GB each), made by the schemes' own libraries (GPTQ and AWQ are packed by
their published layouts), the chats and factors, which a second run takes from there, and the merges of one row at a
time. One line per scheme and adapter:

    worst error     of the dequantised weights here, against the library's own dequantisation
    retention       <Q(W') - W, dW> / |dW|^2 of merge --as same
    KL              in nats a token to the unmerged adapter on the same base, on chats that the unquantised merge
                    answered: of the base without adapter, of --as bfloat16, and of --as same
    same tokens     share of places where the merge would choose the unmerged adapter's token: --as bfloat16, --as same
    verify          of --as bfloat16 and --as same, and of the exact factors, by weights

The adapters were trained on the unquantised model (--force says that this is meant). DuDe was trained beside a
residual, which cannot be cut out of quantised weights: it goes in as its exact factors with magnitudes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests" / "merge"))

import packed_bases  # type: ignore[import-not-found]
import quantised_bases  # type: ignore[import-not-found]

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.demo.smollm2 import obtain_base
from adapter_merge.demo.walkthrough import ADAPTERS, adapter_folder
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base, packed_weights
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.verification.live_adapter import quiet_libraries
from adapter_merge.verification.text_divergence import TextFigures, text_divergence

SCHEMES = ("FP8", "FP8_DYNAMIC", "INT8", "int8", "W8A16", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16", "nf4",
           *packed_bases.KINDS)  # fmt: skip
QUESTIONS = ("What is the capital of Italy?", "What is gravity?", "Tell me about the sea.", "How do I make tea?")
ANSWER_TOKENS = 40
Dense = dict[str, Tensor]


def quantised_base(scheme: str, plain: Path, folder: Path) -> Dense:
    """Make the base in `folder`; return the library's dequantised weights."""
    import transformers

    def load(*_: object, **__: object) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()

    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    quantised_bases.llama = packed_bases.llama = load
    with quiet_libraries():
        make: Callable[..., tuple[Path, Dense]] = quantised_bases.quantised
        if scheme in packed_bases.KINDS:
            make = packed_bases.packed_base
        _, dense = make(scheme, folder)
    shutil.rmtree(folder.with_name(folder.name + "-plain"), ignore_errors=True)
    for file in plain.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    return dense


def worst_error(folder: Path, dense: Dense) -> tuple[int, int, float]:
    """The number of quantised weights, elements that differ from the library's, and the largest difference."""
    base, worst, differ = open_base(folder), 0.0, 0
    names = packed_weights(base)
    for name in names:
        got, wanted = read_tensor(base.tensors[name]), dense[name]
        differ += int((got != wanted).sum())
        worst = max(worst, float((got.double() - wanted.double()).abs().max()))
    return len(names), differ, worst


@torch.inference_mode()
def chats(plain: Path, adapter: Path, scratch: Path, count: int) -> list[str]:
    """The first `count` questions in the model's chat template, with the greedy answers of the unquantised merge."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept, texts = scratch / f"chats-{adapter.name}.json", []
    if kept.is_file():
        return list(json.loads(kept.read_text("utf-8"))[:count])
    merge(plain, adapter, scratch / "plain-merge", MergeOptions(overwrite=True))
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(plain)
        model: Any = AutoModelForCausalLM.from_pretrained(scratch / "plain-merge", dtype=torch.float32).eval()
        for question in QUESTIONS[:count]:
            turn = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            mask = torch.ones_like(ids)
            made = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER_TOKENS,
                                  pad_token_id=0)  # fmt: skip
            texts.append(text + tokenizer.decode(made[0, ids.shape[1] :]))
    shutil.rmtree(scratch / "plain-merge")
    kept.write_text(json.dumps(texts), "utf-8")
    return texts


def row(scheme: str, name: str, adapter: Path, base: Path, dense: Dense, texts: list[str], scratch: Path) -> None:
    weights, differ, worst = worst_error(base, dense)
    reading = ReadOptions(force=True)
    bound = open_pair(base, adapter, None, reading)
    checked = VerifyOptions(weights_only=True, reading=reading)
    figures: dict[str, TextFigures] = {}
    verdicts, retention = [], "-"
    for kind in ("bfloat16", "same"):
        out = scratch / f"merged-{kind}"
        if kind == "same" and scheme in packed_bases.KINDS:
            continue
        options = MergeOptions(write_as=kind, min_retention=0.0, overwrite=True, reading=reading)
        content = merge(base, adapter, out, options).as_json()
        if kind == "same":
            retention = f"{content['certificate']['retention']:.3f}"
        figures[kind] = text_divergence(bound, out, texts)
        verdicts.append(verify(base, adapter, out, checked).passed)
        shutil.rmtree(out)
    factor(base, adapter, scratch / "factors", FactorOptions(reading=reading))
    verdicts.append(verify(base, adapter, scratch / "factors", checked).passed)
    shutil.rmtree(scratch / "factors")
    one, same = figures["bfloat16"], figures.get("same")
    print(
        f"| {scheme} | {name} | {differ} of {weights} weights, {worst:g} | {retention} | {one.kl_base:.3g} | "
        f"{one.kl:.2g} | {'-' if same is None else f'{same.kl:.2g}'} | {one.same_choice:.3f} | "
        f"{'-' if same is None else f'{same.same_choice:.3f}'} | "
        f"{', '.join('PASS' if verdict else 'FAIL' for verdict in verdicts)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--questions", type=int, choices=range(1, len(QUESTIONS) + 1), default=len(QUESTIONS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plain = obtain_base(options.scratch / "smollm2")
    texts = {name: chats(plain, adapter_folder(name), options.scratch, options.questions) for name in options.adapters}
    ready = {}
    for name in options.adapters:
        ready[name] = adapter_folder(name)
        if name.startswith("dude"):
            ready[name] = options.scratch / f"{name}-factors"
            if not ready[name].exists():
                factor(plain, adapter_folder(name), ready[name])
    print("| scheme | adapter | elements off the library's | retention | KL: base | --as bfloat16 | --as same | "
          "same tokens: bfloat16 | same | verify |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for scheme in options.schemes:
        base = options.scratch / scheme.replace(" ", "-")
        dense = quantised_base(scheme, plain, base)
        for adapter in options.adapters:
            row(scheme, adapter, ready[adapter], base, dense, texts[adapter], options.scratch)
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
