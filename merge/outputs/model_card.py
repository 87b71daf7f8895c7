"""Model cards: the README.md of outputs, with the hub's metadata.

The keys follow the hub's model card specification (huggingface_hub, "Model Cards"): base_model (a hub id, never a
path), base_model_relation (adapter or merge), library_name, pipeline_tag, tags.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.files.escaping import code_fence, plain_text
from adapter_merge.methods.adapter import Adapter

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks, 0.32


def is_hub_name(name: object) -> bool:
    """Return True for org/model, which the hub accepts as base_model."""
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def card(
    title: str,
    base: str | None,
    relation: str,
    library: str,
    tags: Iterable[str],
    body: str,
    pipeline: str | None = None,
    extra: Mapping[str, Any] | None = None,  # further keys of the front matter
) -> str:
    """Return a model card with YAML front matter. A base that is not a hub id is left out, since the hub refuses it."""
    from huggingface_hub import ModelCardData

    of_hub = is_hub_name(base)
    data = ModelCardData(
        library_name=library,
        base_model=base if of_hub else None,
        base_model_relation=relation if of_hub else None,
        pipeline_tag=pipeline,
        tags=[*tags, f"base_model:{relation}:{base}"] if of_hub else list(tags),
        **(extra or {}),
    )
    return f"---\n{data.to_yaml()}\n---\n# {plain_text(title)}\n\n{body.rstrip()}\n"


def adapter_table(adapters: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the adapters in a manifest."""
    lines = ["| adapter | method | weights | sha256 |", "|---|---|---|---|"]
    for entry in adapters:
        name, method = plain_text(entry["name"]), plain_text(entry["method"])
        lines.append(f"| {name} | {method} | {entry['modules']} | `{entry['sha256'][:16]}` |")
    return "\n".join(lines)


def combination_line(content: Mapping[str, Any]) -> str:
    """Return a line on the combination of several adapters; empty for one adapter."""
    combination = content.get("options", {}).get("combination")
    if combination is None:
        return ""
    if combination["method"] == "in-turn":
        names = ", ".join(map(plain_text, combination["adapters"]))
        return f"\nApplied in turn, each to the result of those before it: {names}.\n"
    weights = ", ".join(f"{plain_text(name)} {weight:g}" for name, weight in combination["weights"].items())
    defaults = (("density", 1), ("gamma", 0), ("seed", 0))
    settings = [f"{key} {combination[key]:g}" for key, default in defaults if combination[key] != default]
    method = ", ".join([combination["method"], *settings])
    return f"\nCombined in delta space ({method}), weights: {weights}.\n"


def certificate_table(certificate: Mapping[str, Any]) -> str:
    """Return the certificate's figures as a Markdown table."""
    low, high = certificate["ranks"]
    rows = [
        ("weights", str(certificate["weights"])),
        ("rank", str(low) if low == high else f"{low} to {high}"),
        ("relative error of dW, worst weight", f"{certificate['max_relative_error']:.3g}"),
        ("relative error of dW, mean", f"{certificate['mean_relative_error']:.3g}"),
        ("relative spectral error, worst weight", f"{certificate['max_spectral_error']:.3g}"),
        ("energy of dW kept, mean", f"{certificate['mean_energy']:.4%}"),
    ]
    if certificate.get("mean_output_error") is not None:
        rows.append(("relative error of the layers' output, mean", f"{certificate['mean_output_error']:.3g}"))
    end = certificate.get("end_to_end")
    if end is not None:
        effect = "" if end["effect"] is None else f" (the adapter's own effect on them is {end['effect']:.3g})"
        rows += [
            (
                "logits: largest difference",
                f"{end['max_dlogit']:.3g}{effect}",
            ),
            ("logits: mean difference", f"{end['mean_dlogit']:.3g}"),
            ("KL divergence per token, mean", f"{end['mean_kl']:.3g} nats"),
            ("greedy tokens that are equal", f"{end['greedy_equal']} of {end['greedy_total']}"),
        ]
        if end.get("perplexity") is not None:
            perplexity = end["perplexity"]
            rows.append(
                (
                    "perplexity as trained / with these factors",
                    f"{perplexity['trained']:.4f} / {perplexity['factors']:.4f}",
                )
            )
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


LLAMA_CPP = """llama.cpp, with a GGUF file of the base model:

```bash
llama-cli -m BASE.gguf --lora adapter.gguf
```"""


def factor_card(content: Mapping[str, Any], opened: Adapter, folder: Path, title: str) -> str:
    """Return the README.md of a factor folder: its content, its errors, and how each server loads it."""
    base = opened.base_name or content["base"].get("name")
    task = opened.config.get("task_type")
    scaled = content["form"] == "lora+row_scale"
    heads = (folder / "replacements.safetensors").is_file()
    library = "gguf" if content["options"]["format"] == "gguf" else "peft"
    kind = "Exact factors" if content["exact"] else "Truncated factors"
    summary = (
        f"{kind} with one scale per output row (DoRA form). Not a plain LoRA: `use_dora` is true, so that a server "
        "that supports only LoRA refuses it instead of losing the scales."
        if scaled
        else f"{kind}: a plain LoRA of scale 1 (`lora_alpha` is the rank)."
    )
    rank = content["certificate"]["ranks"][1]
    experts = bool(content.get("experts"))
    loading = _loading_section(base, title, task, scaled, heads, rank, experts) if library == "peft" else LLAMA_CPP
    body = f"""{summary}

Made by adapter-merge {content["versions"]["adapter-merge"]} from:

{adapter_table(content["adapters"])}
{combination_line(content)}
## Certificate

Measured on the tensors of this folder, compared with the adapter as trained. `adapter_merge.json` holds the figures of
every weight.

{certificate_table(content["certificate"])}

## How to load it

{loading}"""
    tags = ["adapter-merge", library, "dora" if scaled else "lora"]
    return card(title, base, "adapter", library, tags, body, PIPELINES.get(str(task)))


def _loading_section(
    base: str | None, title: str, task: object, scaled: bool, heads: bool, rank: int, experts: bool
) -> str:
    """Return how PEFT, transformers, vLLM and ONNX Runtime load a factor folder.

    scaled: it has row scales; heads: it replaces whole tensors; experts: it adapts experts.
    """
    model = base or "BASE"
    parts = [_python_loading(model, title, AUTO_CLASSES.get(str(task), "AutoModel"))]
    parts.append(_vllm_loading(model, title, scaled, heads, rank, experts))
    if scaled or not experts:
        parts.append(_onnx_loading(model, title))
    return "\n\n".join(parts)


def _python_loading(model: str, title: str, auto: str) -> str:
    fence = code_fence(model, title)
    return f"""PEFT:

{fence}python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({json.dumps(model, ensure_ascii=False)})
model = PeftModel.from_pretrained(base, {json.dumps(title, ensure_ascii=False)})
{fence}

transformers (with peft installed):

{fence}python
from transformers import {auto}

model = {auto}.from_pretrained({json.dumps(model, ensure_ascii=False)})
model.load_adapter({json.dumps(title, ensure_ascii=False)})
{fence}"""


def _vllm_loading(model: str, title: str, scaled: bool, heads: bool, rank: int, experts: bool) -> str:
    fence = code_fence(model, title)
    if scaled:
        return f"""vLLM refuses DoRA; the plugin of adapter-merge serves it exactly, from `row_scale.safetensors`:

{fence}bash
adapter-merge serve {shlex.quote(model)} {shlex.quote(f"mine={title}")}
{fence}"""
    if experts:
        return (
            "Experts are PEFT's target_parameters. vLLM (0.28 to 0.32) reads them where gate_up_proj and down_proj are "
            "both adapted: for classes that load stacked experts (Qwen3-VL-MoE, Qwen3.5-MoE, gpt-oss, InternS1-Pro), "
            "for other mixtures with --enable-mixed-moe-lora-format and is_3d_lora_weight in the LoRA request. "
            "adapter-merge did not run that: the merged model is served everywhere."
        )
    if heads:
        return (
            "vLLM cannot serve this folder as a LoRA, since heads or biases were trained too: serve the merged model."
        )
    if rank > VLLM_RANKS[-1]:
        return f"vLLM cannot serve rank {rank}, its limit is {VLLM_RANKS[-1]}: serve the merged model."
    max_rank = next(size for size in VLLM_RANKS if size >= rank)
    return f"""vLLM:

{fence}bash
vllm serve {shlex.quote(model)} --enable-lora --max-lora-rank {max_rank} --lora-modules {shlex.quote(f"mine={title}")}
{fence}"""


def _onnx_loading(model: str, title: str) -> str:
    fence = code_fence(model, title)
    return f"""ONNX Runtime, one graph in which adapters are switched at run time:

{fence}bash
adapter-merge export {shlex.quote(model)} {shlex.quote(f"mine={title}")} -o onnx --mode switchable
adapter-merge generate onnx --adapter mine --prompt "Hello"
{fence}"""


def merged_card(content: Mapping[str, Any], title: str, config: Mapping[str, Any]) -> str:
    """Return the README.md of a merged model; `config` is its config.json."""
    name = str(content["base"]["name"])
    architectures = config.get("architectures") or [""]
    auto, pipeline = "AutoModel", None
    for task, cls in AUTO_CLASSES.items():
        if str(architectures[0]).endswith(cls.removeprefix("AutoModel")):
            auto, pipeline = cls, PIPELINES[task]
    servers = ""
    fence = code_fence(title)
    if pipeline == "text-generation":
        servers = f"""
{fence}bash
vllm serve {shlex.quote(title)}
adapter-merge export {shlex.quote(title)} -o onnx --mode merged   # ONNX Runtime
{fence}
"""
    body = f"""Made by adapter-merge {content["versions"]["adapter-merge"]}: the adapters below, merged into the base.

{adapter_table(content["adapters"])}
{combination_line(content)}

`adapter_merge.json` holds the inputs' hashes, the versions, and the size and rounding of every weight's change.

{fence}python
from transformers import {auto}

model = {auto}.from_pretrained({json.dumps(title, ensure_ascii=False)})
{fence}
{servers}"""
    return card(title, name, "merge", "transformers", ["adapter-merge", "merge"], body, pipeline)
