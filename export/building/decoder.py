"""Export of decoders by onnxruntime-genai's model builder: from a checkpoint folder to a graph with a KV cache.

The builder runs in a process of its own (builder_process.py). It only ever sees base weights, or weights that
are merged already: its own adapter option computes DoRA and PiSSA wrongly, without a word.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import Problem, UnsupportedError, raise_all
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.graph.encoder_task import TRACED

from .child_process import first_cause, run_module
from .rotary import rope_problems

# Built, run and compared with transformers in tests/export/building/test_decoders.py
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
)
PRECISIONS = ("fp32", "fp16", "bf16", "int4")
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int4": 0.7}
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json", "tiktoken.model",
)  # fmt: skip
BLOCK_SIZE = 32
HEAD_MULTIPLE = 16  # of head sizes, by onnxruntime's GroupQueryAttention with rotary positions
ACCURACY_LEVEL = 4


def check_decoder(config: Mapping[str, Any], source: Path, precision: str, device: str) -> None:
    """Raise UnsupportedError, with every problem, when the builder cannot export this model exactly."""
    problems = []
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        problems.append(
            Problem(
                f"{source}: cannot export {architecture} to ONNX",
                expected=_nearest(architecture),
                got=architecture,
                hint="merge it instead (adapter-merge merge) and export with the tool that knows this model; "
                "`adapter-merge export --help` names all models",
            )
        )
    else:
        problems += rope_problems(config, source) + head_problems(config, source)
    if config.get("quantization_config"):
        problems.append(
            Problem(f"{source}: is quantized already", "float weights", str(config["quantization_config"])[:100])
        )
    if precision not in PRECISIONS:
        problems.append(Problem(f"unknown precision {precision!r}", ", ".join(PRECISIONS)))
    if precision == "fp32" and device == "cuda":
        problems.append(
            Problem(
                "the model builder's float32 graph for CUDA computes no KV cache: it could not be run",
                expected="--precision fp16, bf16 or int4 with --device cuda, or --device cpu",
            )
        )
    if precision == "bf16" and device == "cpu":
        problems.append(
            Problem(
                "onnxruntime's CPU provider has no bf16 matrix product: the export could not be run there",
                expected="--device cuda, or --precision fp32, fp16 or int4",
            )
        )
    problems += tokenizer_problems(source, opened=not problems)  # transformers reads the configuration for it
    raise_all(problems, UnsupportedError)


def _nearest(architecture: str) -> str:
    """Return what can be exported of the family of `architecture`: its classes of the same first letters."""
    family = re.match(r"[A-Z]+[a-z]*|", architecture)
    assert family is not None
    known = [name for name in (*ARCHITECTURES, *TRACED) if family[0] and name.startswith(family[0])]
    return ", ".join(known) or "another model: nothing of this family can be exported"


def head_problems(config: Mapping[str, Any], source: Path) -> list[Problem]:
    """Return the problem of heads whose size the attention operator (GroupQueryAttention) does not take."""
    heads = int(config.get("num_attention_heads") or 1)
    size = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    if size % HEAD_MULTIPLE == 0:
        return []
    return [
        Problem(
            f"{source}: onnxruntime's attention operator does not run heads of {size} numbers",
            expected=f"a multiple of {HEAD_MULTIPLE}",
            got=str(size),
            hint="merge it instead (adapter-merge merge)",
        )
    ]


def tokenizer_problems(source: Path, opened: bool = True) -> list[Problem]:
    """Return why the tokenizer in `source`, which the builder writes into the export, is not there, or not `opened`."""
    hint = "copy the tokenizer's files from where the model came from"
    if not any(file.name in TOKENIZERS for file in source.iterdir()):
        return [Problem(f"{source}: no tokenizer", "one of " + ", ".join(TOKENIZERS), hint=hint)]
    if not opened:
        return []
    from transformers import AutoTokenizer

    from adapter_merge.verification.live_adapter import quiet_libraries

    try:
        with quiet_libraries():
            AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of every tokenizer library
        return [Problem(f"{source}: transformers cannot open its tokenizer", got=first_cause(error), hint=hint)]
    return []


def io_dtype(precision: str, device: str) -> str:
    """Return the numpy name of the dtype of activations, KV cache and adapter tensors."""
    if precision == "int4":
        return "float32" if device == "cpu" else "float16"
    return {"fp32": "float32", "int8": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]


def build_decoder(
    checkpoint: Path,
    output: Path,
    precision: str = "fp32",
    device: str = "cpu",
    pack: bool = True,
    source: Path | None = None,  # what errors call the checkpoint
) -> None:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer of `checkpoint` into `output`.

    `pack` computes gate and up in one product, as the builder does for q, k and v: the same numbers, fewer
    nodes. fp16 for the CPU is built with the operators that the builder keeps for CUDA (GroupQueryAttention):
    onnxruntime's CPU provider has them too.
    """
    check_packages("onnxruntime_genai", "onnx_ir", "transformers")
    options = ["hf_token=false", f"fuse_mlp_gate_up={str(pack).lower()}"]
    if precision == "int4":
        options += [f"int4_block_size={BLOCK_SIZE}", f"int4_accuracy_level={ACCURACY_LEVEL}"]
    provider = device if precision in ("fp32", "int4") else "cuda"
    if provider != device:
        options.append("fuse_qk_norm_gqa=false")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as temporary:
        job: dict[str, Any] = {
            "checkpoint": str(checkpoint.resolve()),
            "output": str(output.resolve()),
            "precision": precision,
            "provider": provider,
            "cache": f"{temporary}/cache",
            "options": options,
        }
        run_module(
            "adapter_merge.export.building.builder_process",
            job,
            Path(temporary),
            f"the model builder of onnxruntime-genai failed on {source or checkpoint}",
            output / "model.onnx",
            {
                job["checkpoint"]: str(source or checkpoint),
                job["output"]: "the export",
                temporary: "a temporary folder",
            },
        )
    if provider != device:
        _run_on_cpu(output / "genai_config.json")


def _run_on_cpu(config_file: Path) -> None:
    config = json.loads(config_file.read_text("utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    config_file.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
