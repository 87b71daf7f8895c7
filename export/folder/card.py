"""README.md of an export: what it holds, its figures, and programs that run it, without this package.

The programs are complete: they run as they stand, in the folder, with onnxruntime (or onnxruntime-genai) and numpy,
and transformers for the tokenizer. tests/export/folder/test_card.py extracts and runs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.export.engine.decoder_settings import decoder_settings
from adapter_merge.export.engine.providers import graph_file
from adapter_merge.export.graph.encoder_task import is_body
from adapter_merge.export.graph.pooling import Pooling
from adapter_merge.export.graph.targets import Layout
from adapter_merge.files.escaping import plain_text
from adapter_merge.outputs.model_card import card

if TYPE_CHECKING:
    from .export_manifest import Manifest

TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
NUMPY = {"float32": "np.float32", "float16": "np.float16"}
PROVIDERS = {"cpu": "", "cuda": ', providers=["CUDAExecutionProvider"]'}
NEW = 20  # tokens that the programs generate


@dataclass(frozen=True)
class Facts:
    """What the programs depend on."""

    manifest: Manifest
    layout: Layout
    settings: Mapping[str, Any]  # genai_config.json, or nothing
    graph: str  # file, relative to the folder

    @property
    def adapter(self) -> str | None:
        """The first adapter that a program can choose."""
        return next(iter(self.manifest.adapters), None) if self.manifest.mode != "merged" else None

    @property
    def window(self) -> int:
        """The length of a KV cache that slides; 0 where there is none."""
        if self.manifest.mode == "batched" or not self.settings:
            return 0
        return int(self.settings["model"]["decoder"].get("sliding_window", {}).get("window_size", 0))


def export_card(manifest: Manifest, layout: Layout, folder: Path) -> str:
    """Return the README.md of the export in `folder`."""
    facts = Facts(manifest, layout, decoder_settings(folder), graph_file(folder).relative_to(folder).as_posix())
    name = manifest.base_name
    relation = "quantized" if manifest.precision in ("int4", "int8") else "adapter" if manifest.adapters else "finetune"
    title = f"{name} for ONNX Runtime ({manifest.mode}, {manifest.precision})"
    extra: dict[str, Any] = dict(manifest.license)
    if manifest.parity:
        extra["max_logit_difference"] = {
            key: float(f"{value['max_difference']:.3g}") for key, value in manifest.parity.items()
        }
    parts = [_summary(facts), _contents(facts), _programs(facts), _interface(facts), _traps(facts), _versions(facts)]
    body = "\n\n".join(part for part in parts if part)
    return card(title, name, relation, "onnx", ("adapter-merge", "onnx"), body, _pipeline(manifest), extra)


def _pipeline(manifest: Manifest) -> str | None:
    if manifest.kind == "decoder":
        return "text-generation"
    name = str(manifest.options.get("class", ""))
    if is_body(name):
        return "sentence-similarity" if "pooling" in manifest.options else "feature-extraction"
    if name.endswith("ForSequenceClassification") and manifest.options.get("labels") == 1:
        return "text-ranking"
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def _summary(facts: Facts) -> str:
    manifest = facts.manifest
    said = {
        "merged": "The adapters below are in the weights." if manifest.adapters else "The base, without an adapter.",
        "switchable": "One graph. Without an adapter it computes the base; an adapter is a small file, chosen at run "
        "time.",
        "batched": "Every sequence of a batch chooses its adapter by a number, in the input `adapter_ids`.",
    }[manifest.mode]
    return f"{plain_text(manifest.base_name)}, {manifest.precision}, built for {manifest.device}. {said}"


def _contents(facts: Facts) -> str:
    parity = facts.manifest.parity
    rows = []
    for name, entry in {"base": {}, **facts.manifest.adapters}.items():
        figures = parity.get(name) or (parity.get("merged") if name != "base" else None)
        if name == "base" and figures is None:
            continue
        where = "without an adapter" if name == "base" else _where(entry)
        shown = f"{figures['max_difference']:.2g}" if figures else "not checked"
        equal = f"{figures['greedy_equal']} of {figures['greedy_total']}" if figures else ""
        source = plain_text(Path(entry["source"]).name) if "source" in entry else ""
        rows.append(f"| {plain_text(name)} | {where} | {source} | {shown} | {equal} |")
    if not rows:
        return ""
    head = ["| adapter | where | made from | largest logit difference | greedy tokens equal |", "|---|---|---|---|---|"]
    note = "Differences are to the live model in PyTorch float32, measured when this folder was written."
    return "\n".join([*head, *rows, "", note])


def _where(entry: Mapping[str, Any]) -> str:
    if "id" in entry:
        return f"`adapter_ids` {entry['id']}"
    return f"`{entry['file']}`" if "file" in entry else "in the weights"


def _programs(facts: Facts) -> str:
    if facts.manifest.kind == "encoder":
        return f"## Run it\n\n```python\n{_encoder(facts)}\n```"
    parts = []
    if facts.settings and facts.manifest.mode != "batched":
        parts.append(f"## Run it with onnxruntime-genai\n\n```python\n{_genai(facts)}\n```")
    if facts.layout.dtype in NUMPY:
        parts.append(f"## Run it with onnxruntime\n\n```python\n{_loop(facts)}\n```")
    return "\n\n".join(parts)


def _genai(facts: Facts) -> str:
    load = choose = ""
    if facts.adapter is not None:
        name, file = json.dumps(facts.adapter), json.dumps(f"{facts.adapter}.onnx_adapter")
        load = f"adapters = og.Adapters(model)\nadapters.load({file}, {name})\n"
        choose = f"generator.set_active_adapter(adapters, {name})  # before the first token; without it: the base\n"
    return f"""import onnxruntime_genai as og

model = og.Model(".")  # this folder
tokenizer = og.Tokenizer(model)
{load}tokens = tokenizer.encode("Hello, world")
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(tokens) + {NEW}, do_sample=False)
generator = og.Generator(model, parameters)
{choose}generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(tokens):]))"""


def _loop(facts: Facts) -> str:
    rows = 1 if facts.window else 2
    prompts = ["Hello, world", "A prompt of another length"][:rows]
    feeds, before, run = "", "", ""
    if facts.manifest.mode == "batched":
        ids = [1, 0]
        before = f"adapter_ids = np.array({ids})  # one number a row; 0 is the base\n"
        feeds = ', "adapter_ids": adapter_ids'
    elif facts.adapter is not None:
        before, run = _active(facts.adapter), ", run"
    size = f"max({facts.window}, ids.shape[1] + {NEW})  # at least the sliding window" if facts.window else "0"
    dtype = NUMPY[facts.layout.dtype]
    return f"""import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

options = ort.SessionOptions()
options.log_severity_level = 3  # without a warning for every optional input
session = ort.InferenceSession("model.onnx", options{PROVIDERS[facts.manifest.device]})
tokenizer = AutoTokenizer.from_pretrained(".", padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
{before}batch = tokenizer({json.dumps(prompts)}, return_tensors="np", padding=True)
ids, mask = batch["input_ids"], batch["attention_mask"]
positions = {size}
past = {{
    value.name: np.zeros((len(ids), value.shape[1], positions, value.shape[3]), {dtype})
    for value in session.get_inputs()
    if value.name.startswith("past_key_values.")
}}
names = [value.name for value in session.get_outputs()]
answers = np.zeros((len(ids), 0), np.int64)
for _ in range({NEW}):  # a real loop ends at tokenizer.eos_token_id
    feeds = {{"input_ids": ids, "attention_mask": mask{feeds}, **past}}
    outputs = dict(zip(names, session.run(None, feeds{run})))
    ids = outputs["logits"][:, -1].argmax(-1)[:, None]
    mask = np.concatenate([mask, np.ones_like(ids)], 1)
    past = {{name: outputs[name.replace("past_key_values", "present")] for name in past}}
    answers = np.concatenate([answers, ids], 1)
for answer in answers:
    print(tokenizer.decode(answer))"""


def _active(adapter: str) -> str:
    return f"""adapter = ort.LoraAdapter()
adapter.Load({json.dumps(f"{adapter}.onnx_adapter")})
run = ort.RunOptions()
run.add_active_adapter(adapter)  # one; without it: the base
"""


def _encoder(facts: Facts) -> str:
    before, run, feeds = "", "", ""
    if facts.manifest.mode == "batched":
        feeds = 'feeds["adapter_ids"] = np.array([1, 0])  # one number a row; 0 is the base\n'
    elif facts.adapter is not None:
        before, run = _active(facts.adapter), ", run"
    return f"""import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

options = ort.SessionOptions()
options.log_severity_level = 3  # without a warning for every optional input
session = ort.InferenceSession({json.dumps(facts.graph)}, options{PROVIDERS[facts.manifest.device]})
tokenizer = AutoTokenizer.from_pretrained(".")
{before}batch = tokenizer(["Hello, world", "A text of another length"], return_tensors="np", padding=True)
zeros = np.zeros_like(batch["input_ids"])
feeds = {{value.name: batch.get(value.name, zeros) for value in session.get_inputs()}}
{feeds}for value, result in zip(session.get_outputs(), session.run(None, feeds{run})):
    print(value.name, result.tolist())"""


def _interface(facts: Facts) -> str:
    if facts.manifest.kind == "encoder":
        lines = [
            "- `input_ids`, `attention_mask`, and `token_type_ids` where the model has it: (batch, sequence), int64",
            "- outputs, float32: " + _answers(facts),
        ]
    else:
        lines = [
            "- `input_ids`: (batch, new), int64",
            "- `attention_mask`: (batch, past + new), int64; 0 for padding, on any side",
            "- `past_key_values.N.key` and `.value`: (batch, heads, past, head size), "
            f"{facts.layout.dtype}; length 0 at the first call, then the outputs `present.N.key` and `.value`",
            f"- output `logits`: (batch, new, vocabulary), {facts.layout.dtype}",
        ]
    if facts.manifest.mode == "batched":
        lines.append("- `adapter_ids`: (batch,), int64; 0 (the base) where it is not given")
    if facts.manifest.mode == "switchable":
        lines.append(
            "- optional, what an adapter file holds: `MODULE.lora_A.weight` (in, rank), `MODULE.lora_B.weight` "
            "(rank, out), `MODULE.out_scale` (out,)"
            + (", `adapter_active` (1,): 1 where one is given" if facts.layout.branched else "")
        )
    return "\n".join(["## Inputs and outputs", "", *lines])


def _answers(facts: Facts) -> str:
    options = facts.manifest.options
    if not is_body(str(options.get("class", ""))):
        return "logits"
    if "pooling" not in options:
        return "`last_hidden_state` (batch, sequence, width)"
    pooling = Pooling(**options["pooling"])
    return f"`last_hidden_state` (batch, sequence, width) and `sentence_embedding` (batch, width): {pooling}"


def _traps(facts: Facts) -> str:
    manifest = facts.manifest
    lines = []
    if manifest.mode == "switchable":
        lines += [
            "- One adapter at a time: onnxruntime accepts two active ones and mixes them, without an error.",
            "- `run_with_iobinding` ignores active adapters and answers as the base: bind the adapter's tensors "
            "(`ort.AdapterFormat.read_adapter(FILE).get_parameters()`) as inputs.",
            "- An adapter belongs to this graph; onnxruntime does not check that. `model_version` in the file tells "
            "them apart.",
        ]
        if manifest.kind == "decoder":
            lines.append("- Switch between answers, not within one: the KV cache holds the other adapter's values.")
    if manifest.mode == "batched":
        lines += [
            *(
                ["- onnxruntime-genai cannot run this folder: it ignores `adapter_ids`."]
                if manifest.kind == "decoder"
                else []
            ),
            "- A number that no adapter has ends the run with an error that says so.",
        ]
    if facts.window:
        lines.append(
            f"- Sliding window of {facts.window}: a KV cache of at least that many positions, of fixed length, and one "
            "sequence (or sequences of one length) at a time."
        )
    elif manifest.kind == "decoder" and facts.settings:
        lines.append("- Padding belongs into the first call (the prompt); later calls are of one token a row.")
    if manifest.precision in ("int4", "int8") and manifest.adapters:
        what = (
            "the merged weights are quantised"
            if manifest.mode == "merged"
            else "adapters stay in floating point over the quantised base, which is not merging and then quantising"
        )
        lines.append(f"- {manifest.precision}: {what}.")
    return "\n".join(["## Good to know", "", *lines]) if lines else ""


def _versions(facts: Facts) -> str:
    need = ["onnxruntime 1.31"] if facts.window or facts.layout.branched else ["onnxruntime 1.24"]
    if facts.settings and facts.manifest.mode != "batched":
        need.append("onnxruntime-genai 0.18")
    return f"Tested with {' and '.join(need)}, and newer."
