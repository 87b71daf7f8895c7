"""Quantised bases and what `merge` makes of them, loaded by vLLM: python benchmarks/quantised_vllm.py --vllm PYTHON

PYTHON has vLLM (its CPU build here). Each base is a Llama of two layers that compressed-tensors quantised; a LoRA that
PEFT made is merged with --as same and with --as bfloat16. Every line is one model in stock vLLM, without this package:
the mean and largest |dlogprob| over the whole vocabulary after two prompts, from transformers in float32 on the
dequantised weights, and the mean |dlogprob| that the adapter makes. What vLLM refuses is printed with its reason.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge"))

import peft
import quantised_bases  # type: ignore[import-not-found]
import transformers
from pico_bases import quiet, train  # type: ignore[import-not-found]

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.tensor_io import read_tensor

SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "FP8", "FP8_BLOCK", "INT8", "NVFP4A16", "MXFP4A16")
PROMPTS = [[5, 9, 33, 42, 71, 8, 17, 60], [11, 90, 4, 4, 52, 31, 77, 6]]
RUN = """
import json, os, sys
os.environ |= {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from vllm import LLM, SamplingParams
model, prompts, online = json.loads(sys.argv[1])
llm = LLM(model=model, dtype="bfloat16", quantization=online, skip_tokenizer_init=True, enforce_eager=True,
          max_model_len=64, max_logprobs=-1, max_num_seqs=2)
sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
made = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
found = [row.outputs[0].logprobs[0] for row in made]
print("FOUND", json.dumps([[row[token].logprob for token in sorted(row)] for row in found]))
"""
LogProbabilities = torch.Tensor  # (prompts, vocabulary)


@torch.no_grad()
def in_transformers(folder: Path) -> LogProbabilities:
    """Of the next token after each prompt, float32, from the dequantised weights."""
    base = open_base(folder)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(dict(base.config))).float()
    model.load_state_dict({name: read_tensor(ref).float() for name, ref in base.tensors.items()})
    rows: LogProbabilities = model.eval()(torch.tensor(PROMPTS)).logits[:, -1].log_softmax(-1)
    return rows


def in_vllm(python: str, folder: Path, online: str | None = None) -> LogProbabilities | str:
    """Of the next token after each prompt; or the last line of the error. `online` is vLLM's --quantization."""
    job = json.dumps([str(folder), PROMPTS, online])
    run = subprocess.run([python, "-c", RUN, job], capture_output=True, text=True, check=False)
    for line in run.stdout.splitlines():
        if line.startswith("FOUND "):
            return torch.tensor(json.loads(line.removeprefix("FOUND ")))
    reasons = re.findall(r"\w*Error: .*", run.stderr)
    return (reasons or run.stderr.splitlines() or ["no output"])[-1][:150]


def distance(found: LogProbabilities | str, right: LogProbabilities) -> str:
    if isinstance(found, str):
        return found
    apart = (found - right).abs()
    return f"{float(apart.mean()):.4f}, {float(apart.max()):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="a Python that has vLLM")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    stated = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, quiet():
        root = Path(place)
        quantised_bases.llama(256).save_pretrained(root / "plain")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "gate_proj", "down_proj"])
        train(root / "plain", config, root / "lora")
        print("| model | mean, largest \\|dlogprob\\| | the adapter's effect |")
        print("|---|---|---|", flush=True)
        online = distance(in_vllm(stated.vllm, root / "plain", "fp8"), in_transformers(root / "plain"))
        print(f"| unquantised, --quantization fp8 | {online} | - |", flush=True)
        for scheme in stated.schemes:
            base, _ = quantised_bases.quantised(scheme, root / scheme, 256)
            alone = in_transformers(base)
            print(f"| {scheme} | {distance(in_vllm(stated.vllm, base), alone)} | - |", flush=True)
            for kind in ("same", "bfloat16"):
                merge(base, root / "lora", root / kind, MergeOptions(write_as=kind, overwrite=True))
                right = in_transformers(root / kind)
                found = distance(in_vllm(stated.vllm, root / kind), right)
                print(f"| {scheme}, --as {kind} | {found} | {float((right - alone).abs().mean()):.2f} |", flush=True)


if __name__ == "__main__":
    main()
