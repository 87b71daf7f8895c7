"""Quantise a model with GPTQModel on a CPU, and write what GPTQModel itself dequantises beside it.

    pip install --no-deps gptqmodel logbar tokenicer device-smi threadpoolctl defuser torchao pypcre dill maturin
    python benchmarks/gptqmodel_bases.py MODEL OUT KIND [--group 64] [--texts FILE]
    python benchmarks/gptqmodel_bases.py pico tests/merge/quantisation/schemes/gptqmodel_files all --group 32

GPTQModel 7.7 asks for another torch than this package is tested with, changes transformers and safetensors when it is
imported, and comes as source alone: it runs in its own process, from its own environment.

OUT becomes the quantised checkpoint as `GPTQModel.save` writes it, and OUT-dense.safetensors the weights (out, in) that
its inference kernel computes with (TorchLinear.dequantize_weight, AwqTorchLinear), after `GPTQModel.load` has read the
checkpoint: for GPTQ of version 1 this includes its own conversion of the zero points to version 2.

"awq" includes AWQ's search for scales: it multiplies columns of a weight by factors and divides the norm or the weight
before it by the same factors. The model stays the same; an adapter that was trained on the unquantised model does not
fit it any more. "awq-nearest" has the same layout and packer, and weights that are rounded to the nearest code without
that search. GPTQModel writes quant_method "gptq" for it, which is not its layout; config.json is corrected here.

Calibration takes the texts of --texts (a JSON list), or random tokens. The second form makes the files of the tests: a
Llama of one layer in every kind, of which the weights and config.json are kept, with the sha256 of each dense weight.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool of loaders needs two

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]
from gptqmodel.quantization import FORMAT  # type: ignore[import-not-found]
from gptqmodel.quantization.config import AWQConfig, GPTQConfig, RTNConfig  # type: ignore[import-not-found]
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (GPTQConfig, {"sym": True, "desc_act": False}),
    "gptq-asymmetric": (GPTQConfig, {"sym": False, "desc_act": True}),
    "gptq-v2": (GPTQConfig, {"sym": False, "desc_act": True, "format": FORMAT.GPTQ_V2}),
    "gptq-int8": (GPTQConfig, {"sym": False, "desc_act": False, "bits": 8}),
    "gptq-mixed": (GPTQConfig, {"sym": True, "dynamic": {"-:.*o_proj": {}, ".*down_proj": {"bits": 8}}}),
    "awq": (AWQConfig, {"sym": False}),
    "awq-symmetric": (AWQConfig, {"sym": True}),
    "awq-nearest": (RTNConfig, {"sym": False, "format": FORMAT.GEMM}),
}
RANDOM_TEXTS, RANDOM_TOKENS = 16, 48


def quantise(model: Path, out: Path, kind: str, group: int, texts: list[str]) -> None:
    """Write the quantised checkpoint to `out`."""
    config, settings = KINDS[kind]
    common = {"bits": 4, "group_size": group, "offload_to_disk": False}
    loaded = GPTQModel.load(str(model), config(**(common | settings)), dtype=torch.float16)
    if texts:
        ids = [loaded.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    else:
        size = loaded.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(size, (1, RANDOM_TOKENS), generator=generator) for _ in range(RANDOM_TEXTS)]
    loaded.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    loaded.save(str(out))
    if kind == "awq-nearest":
        file = out / "config.json"
        content = json.loads(file.read_text("utf-8"))
        content["quantization_config"] |= {
            "quant_method": "awq",
            "method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
        file.write_text(json.dumps(content, indent=2), "utf-8")
        (out / "quantize_config.json").unlink()


@torch.inference_mode()
def dequantised(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The quantised weights of the checkpoint in `folder`, as GPTQModel's own kernel computes with them."""
    backend = BACKEND.AWQ_TORCH if kind.startswith("awq") else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model.eval()
    dense = {}
    for name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        if kind.startswith("awq"):
            weight = module._dequantize_weight_for_inference(torch.empty(0), dtype=torch.float16)
        else:
            weight = type(module).dequantize_weight(module)  # not the instance's compiled one
        dense[f"{name}.weight"] = weight.T.contiguous()
    return dense


def pico(folder: Path) -> None:
    """Write a Llama of one layer with random weights, and a tokenizer of whole words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=32, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(32)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2").save_pretrained(folder)


def write_test_files(target: Path, group: int) -> None:
    """Write config.json, model.safetensors and dense.json (sha256 of each dense weight's bytes) of every kind."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain"
        pico(plain)
        for kind in KINDS:
            made, folder = Path(scratch) / kind, target / kind
            quantise(plain, made, kind, group, [])
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                shutil.copy(made / name, folder / name)
            sums = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
                    for name, value in sorted(dequantised(made, kind).items())}  # fmt: skip
            (folder / "dense.json").write_text(json.dumps(sums, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or pico")
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=(*KINDS, "all"))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--texts", type=Path, help="a JSON list of texts for the calibration")
    stated = parser.parse_args()
    out = stated.out.resolve()
    texts = [] if stated.texts is None else json.loads(stated.texts.read_text("utf-8"))
    model = Path(stated.model).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel writes a folder "logs" into the working directory
        if stated.model == "pico":
            write_test_files(out, stated.group)
        else:
            quantise(model, out, stated.kind, stated.group, texts)
            save_file(dequantised(out, stated.kind), out.with_name(f"{out.name}-dense.safetensors"))


if __name__ == "__main__":
    main()
