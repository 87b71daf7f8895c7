"""Parity of ONNX exports with the live models, by architecture, mode and precision: the exports' own checks as a table.

    python benchmarks/onnx_parity.py SCRATCH [--only bert gpt2 ...] [--modes switchable] [--dtypes float32]

Small random models of every architecture (tests/export/pico_models.py) with a DoRA adapter of rank 4 on every linear.
A row is what the check that ends an export measured (export/checking/parity.py): the largest difference of a logit (or
of a hidden state, of a sentence's vector) from transformers and PEFT in float32, of the base and with the adapter, the
adapter's own effect, and how many greedy choices are equal. A refusal is a row that says why. Rows are kept
in SCRATCH/rows.json: a second run makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "export"))

DECODERS = ("llama", "mistral", "mistral-window", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "granite")
ENCODERS = {  # family -> task
    "bert": "SequenceClassification",
    "roberta": "MaskedLM",
    "xlm-roberta": "TokenClassification",
    "mpnet": "Model",
    "distilbert": "Model",
    "modernbert": "Model",
    "deberta-v2": "SequenceClassification",
}
PRECISIONS = {"float32": "fp32", "float16": "fp16", "int8": "int8", "int4": "int4"}
MODES = ("merged", "switchable", "batched")
HEAD = "| model | mode | dtype | base | with adapter | adapter's effect | greedy equal |\n|---|---|---|---|---|---|---|"


def save(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the base and its adapter."""
    from pico_models import save_encoder, save_encoder_adapter, save_gpt2, save_lora, save_pico

    base, adapter = folder / "base", folder / "adapter"
    if base.is_dir() and adapter.is_dir():
        return base, adapter
    if name == "gpt2":
        save_gpt2(base)
        targets = ["c_attn", "c_fc", "c_proj"]
        save_lora(base, adapter, 1, use_dora=True, target_modules=targets, fan_in_fan_out=True)
    elif name in ENCODERS:
        kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "Model": "FEATURE_EXTRACTION"}
        save_encoder(base, name, task=ENCODERS[name])
        save_encoder_adapter(base, adapter, 1, use_dora=True, task_type=kinds.get(ENCODERS[name]))
    else:
        save_pico(base, name)
        save_lora(base, adapter, 1, use_dora=True)
    return base, adapter


def measure(name: str, mode: str, dtype: str, scratch: Path) -> list[str]:
    """Return the cells of one export behind its model, mode and dtype."""
    import shutil

    from adapter_merge.errors import AdapterMergeError
    from adapter_merge.export.exporting import export_model

    base, adapter = save(name, scratch / name)
    output = scratch / name / "out"
    pooled = ENCODERS.get(name) == "Model"
    pooling: dict[str, Any] = {"pooling": "mean", "normalize": True} if pooled else {}
    try:
        report = export_model(
            base, {"a": adapter}, output, mode=mode, precision=PRECISIONS[dtype], overwrite=True, **pooling
        )
    except AdapterMergeError as error:
        return [f"refused: {error.problems[0].cause.rpartition(': ')[2]}", "", "", ""]
    finally:
        shutil.rmtree(output, ignore_errors=True)
    parity = report["parity"]
    adapted = parity["merged" if mode == "merged" else "a"]
    plain = f"{parity['base']['max_difference']:.1e}" if "base" in parity else ""
    equal = f"{adapted['greedy_equal']} of {adapted['greedy_total']}"
    return [plain, f"{adapted['max_difference']:.1e}", f"{adapted['effect']:.2g}", equal]


def main() -> None:
    """Print the table."""
    names = (*DECODERS, "smollm3", "gpt2", *ENCODERS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS))
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    file = options.scratch / "rows.json"
    rows: dict[str, list[str]] = json.loads(file.read_text()) if file.is_file() else {}
    print(HEAD)
    for name in options.only:
        other = "int4" if name in ENCODERS else "int8"  # int4 is for decoders, int8 for encoders
        for mode in options.modes:
            for dtype in options.dtypes:
                key = f"{name} {mode} {dtype}"
                if dtype == other:
                    continue
                if key not in rows:
                    rows[key] = measure(name, mode, dtype, options.scratch)
                    file.write_text(json.dumps(rows, indent=1))
                print("| " + " | ".join([name, mode, dtype, *rows[key]]) + " |", flush=True)


if __name__ == "__main__":
    main()
