"""The demo's adapters on a SmolLM2-135M of every quantisation scheme: merged in each way, beside the unmerged adapter.

    python benchmarks/quantised_retention.py SCRATCH [--schemes NAME ...] [--adapters NAME ...] [--questions N]
                                             [--gptqmodel PYTHON] [--verify]

The bases (0.1 to 0.4 GB each) are made by the schemes' own libraries: compressed-tensors, bitsandbytes through
transformers, and for GPTQ and AWQ GPTQModel, with the Python of --gptqmodel (see gptqmodel_bases.py). Figures are
written to SCRATCH/retention.json when a scheme and adapter are done, and are not computed again; the table holds
all that are in the file. One line per scheme and adapter:

    worst error     of the dequantised weights here, against the library's own dequantisation
    retention       <Q(W') - W, dW> / |dW|^2 of merge --as same
    KL              in nats a token to the unmerged adapter on the same base, on chats that the unquantised merge
                    answered: of the base without adapter, of --as bfloat16, and of --as same; and what quantising
                    the base costs, of --as bfloat16 to the adapter on the unquantised base
    same tokens     share of places where the merge would choose the unmerged adapter's token: --as bfloat16, --as same
    verify          of --as bfloat16 and --as same, and of the exact factors, by weights (with --verify)

The adapters were trained on the unquantised model (--force says that this is meant). DuDe was trained beside a
residual, which cannot be cut out of quantised weights: it goes in as its exact factors with magnitudes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests" / "merge"))

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
from adapter_merge.verification.text_divergence import text_divergence

SCHEMES = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "INT8", "int8", "W8A16", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16",
           "nf4")  # fmt: skip
GPTQMODEL = ("gptq", "gptq-v2", "gptq-int8", "awq", "awq-nearest")  # kinds of gptqmodel_bases.py
RESULTS = "retention.json"
COLUMNS = (("retention", ".3f"), ("kl base", ".3g"), ("kl bfloat16", ".2g"), ("kl same", ".2g"),
           ("kl unquantised", ".2g"), ("same choice bfloat16", ".3f"), ("same choice same", ".3f"))  # fmt: skip
QUESTIONS = ("What is the capital of Italy?", "What is gravity?", "Tell me about the sea.", "How do I make tea?")
ANSWER_TOKENS = 40
Dense = dict[str, Tensor]


def gptqmodel_base(python: str, kind: str, plain: Path, texts: Path, folder: Path) -> Dense:
    """Make the base in `folder` with GPTQModel, calibrated on `texts`; return the weights that it dequantises."""
    shutil.rmtree(folder, ignore_errors=True)
    script = Path(__file__).with_name("gptqmodel_bases.py")
    command = [python, str(script), str(plain), str(folder), kind, "--texts", str(texts)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"GPTQModel failed:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
    file = folder.with_name(f"{folder.name}-dense.safetensors")
    dense: Dense = load_file(file)
    file.unlink()
    return dense


def quantised_base(scheme: str, plain: Path, folder: Path) -> Dense:
    """Make the base in `folder`; return the library's dequantised weights."""
    import transformers

    def load(*_: object, **__: object) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()

    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    quantised_bases.llama = load
    with quiet_libraries():
        dense: Dense = quantised_bases.quantised(scheme, folder)[1]
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


def measure(
    scheme: str,
    adapter: Path,
    plain: Path,
    base: Path,
    dense: Dense,
    texts: list[str],
    scratch: Path,
    verified: bool,
) -> dict[str, Any]:
    """Merge `adapter` in each way, and return the figures of one line; those of verify where `verified`."""
    weights, differ, worst = worst_error(base, dense)
    reading = ReadOptions(force=True)
    bound = open_pair(base, adapter, None, reading)
    unquantised = open_pair(plain, adapter, None, reading)
    checked = VerifyOptions(weights_only=True, reading=reading)
    figures: dict[str, Any] = {"weights": weights, "differ": differ, "worst": worst, "texts": len(texts), "verify": {}}
    for kind in ("bfloat16", "same"):
        out = scratch / f"merged-{kind}"
        if kind == "same" and scheme in GPTQMODEL:
            continue
        options = MergeOptions(write_as=kind, min_retention=0.0, overwrite=True, reading=reading)
        content = merge(base, adapter, out, options).as_json()
        if kind == "same":
            figures["retention"] = content["certificate"]["retention"]
        found = text_divergence(bound, out, texts)
        if kind == "bfloat16":
            figures["kl unquantised"] = text_divergence(unquantised, out, texts).kl
        figures["kl base"], figures["tokens"] = found.kl_base, found.tokens
        figures[f"kl {kind}"], figures[f"same choice {kind}"] = found.kl, found.same_choice
        if verified:
            figures["verify"][kind] = verify(base, adapter, out, checked).passed
        shutil.rmtree(out)
    if verified:
        factor(base, adapter, scratch / "factors", FactorOptions(reading=reading))
        figures["verify"]["factors"] = verify(base, adapter, scratch / "factors", checked).passed
        shutil.rmtree(scratch / "factors")
    return figures


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print("| scheme | adapter | elements off the library's | retention | KL: base | --as bfloat16 | --as same | "
          "to unquantised | same tokens: bfloat16 | same | verify | chats |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    order = {scheme: place for place, scheme in enumerate((*SCHEMES, *GPTQMODEL))}
    for key in sorted(results, key=lambda key: (order[key.split("/")[0]], key)):
        one = results[key]
        cells = [f"{one['differ']} of {one['weights']} weights, {one['worst']:g}"]
        for name, style in COLUMNS:
            cells.append(format(one[name], style) if name in one else "-")
        cells.append(
            ", ".join(f"{kind} {'PASS' if passed else 'FAIL'}" for kind, passed in one["verify"].items()) or "-"
        )
        print(f"| {key.replace('/', ' | ')} | {' | '.join(cells)} | {one['texts']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--schemes", nargs="+", choices=(*SCHEMES, *GPTQMODEL))
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--questions", type=int, choices=range(1, len(QUESTIONS) + 1), default=len(QUESTIONS))
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="a Python that has gptqmodel; without it no GPTQ and AWQ")
    parser.add_argument("--verify", action="store_true", help="also verify every merge and the exact factors")
    options = parser.parse_args()
    schemes = options.schemes or (*SCHEMES, *(GPTQMODEL if options.gptqmodel else ()))
    if options.gptqmodel is None and set(schemes) & set(GPTQMODEL):
        parser.error("GPTQ and AWQ bases need --gptqmodel")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plain, kept = obtain_base(options.scratch / "smollm2"), options.scratch / RESULTS
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    texts = {name: chats(plain, adapter_folder(name), options.scratch, options.questions) for name in options.adapters}
    ready = {}
    for name in options.adapters:
        ready[name] = adapter_folder(name)
        if name.startswith("dude"):
            ready[name] = options.scratch / f"{name}-factors"
            if not ready[name].exists():
                factor(plain, adapter_folder(name), ready[name])
    for scheme in schemes:
        missing = [
            name for name in options.adapters if results.get(f"{scheme}/{name}", {}).get("texts") != len(texts[name])
        ]
        if not missing:
            continue
        base = options.scratch / scheme
        if scheme in GPTQMODEL:
            calibration = options.scratch / f"chats-{adapter_folder(missing[0]).name}.json"
            dense = gptqmodel_base(options.gptqmodel, scheme, plain, calibration, base)
        else:
            dense = quantised_base(scheme, plain, base)
        for name in missing:
            results[f"{scheme}/{name}"] = measure(
                scheme, ready[name], plain, base, dense, texts[name], options.scratch, options.verify
            )
            replace_file(kept, json.dumps(results, indent=1))
        shutil.rmtree(base)
    print_table(results)


def replace_file(file: Path, content: str) -> None:
    """Write `content` so that an interruption leaves the old file or the new one."""
    new = file.with_suffix(".new")
    new.write_text(content, "utf-8")
    new.replace(file)


if __name__ == "__main__":
    main()
