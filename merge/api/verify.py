"""Proof that an artefact computes what was trained: weights one by one, then logits and greedy tokens in float32.

weights   every adapted weight against the canonical form in float64; everything else byte for byte the base's
logits    the artefact against the live, unmerged adapter (live_adapter.py) on prompts and on the tokens it generates

A combination has no live form of its own: each of its adapters is proved live, and their combination by definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.open_inputs import AdapterInput, open_pair, parts_of
from adapter_merge.combine.recipe import Recipe
from adapter_merge.errors import InputError, ParityError
from adapter_merge.formats.detection import ReadOptions
from adapter_merge.outputs.staging import read_manifest
from adapter_merge.storage.checkpoint import CANDIDATES, open_checkpoint, read_json, resolve
from adapter_merge.verification.compare_logits import compare_logits, token_paths, unlike_live
from adapter_merge.verification.compare_weights import (
    carried_over,
    delta_weights,
    factor_weights,
    half_dtype,
    merged_weights,
    weight_problems,
)
from adapter_merge.verification.live_model import trained_model

LOGIT_TOLERANCE = 1e-4
GENERATED = 32


def verify(
    base: str | Path | None,
    adapter: AdapterInput,
    artefact: str | Path,
    *,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    prompts: Sequence[str] | None = None,
    generated: int = GENERATED,
    tolerance: float | None = None,
    weights_only: bool = False,
    onnx: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compare `artefact` (merged model, factors, deltas, converted adapter) with `adapter`, or a Recipe, on `base`.

    prompts: texts; built-in ones when None, random tokens where the base has no tokenizer. tolerance: for max
    |dlogit|; 1e-4 when None, and for a half-precision artefact none, since its weights are held to one rounding.
    onnx: what verifies an ONNX folder (the command line passes the export package's function).
    Returns the report; "passed" says whether all of it holds. Raises InputError for what is no artefact.
    """
    bound = open_pair(base, adapter, base_kind, options)
    folder = resolve(artefact)
    kind = artefact_kind(folder)
    if kind == "onnx":
        if onnx is None:
            raise InputError(f"{folder}: an ONNX folder", hint="pip install 'adapter-merge[onnx]'")
        if isinstance(adapter, Recipe):
            raise InputError(f"{folder}: an ONNX folder holds adapters one by one", hint="verify it with each of them")
        return onnx(bound.base.folder, bound.adapter.folder, folder, prompts=prompts, bar=tolerance)
    report: dict[str, Any] = {
        "artefact": kind,
        "path": str(folder),
        "adapter": {
            "path": ", ".join(str(part.adapter.folder) for part in parts_of(bound)),
            "method": bound.adapter.method,
        },
        "base": {"path": str(bound.base.folder), "kind": bound.base_kind, "evidence": bound.evidence},
    }
    problems: list[str] = []
    report["notes"] = _other_base(folder, bound)
    half = None
    if kind == "merged model":
        merged = open_checkpoint(folder)
        layers, half = merged_weights(bound, merged), half_dtype(bound, merged.tensors)
        problems += carried_over(bound, merged)
    elif kind == "deltas":
        layers, half = delta_weights(bound, folder)
    elif kind == "factors":
        layers = factor_weights(bound, folder)
    else:
        layers = {}
    report["layers"] = {name: asdict(figures) for name, figures in layers.items()}
    report["half_precision"] = half
    exact = _is_exact(folder)
    problems += weight_problems(layers, half) if exact else []
    if not weights_only:
        limit = tolerance if tolerance is not None else (math.inf if half else LOGIT_TOLERANCE)
        report["tolerance"] = None if math.isinf(limit) else limit
        wrong = [name for part in parts_of(bound) for name in unlike_live(part, trained_model(part, torch.float64))]
        if wrong:
            problems.append(f"the live adapter computes other weights in {len(wrong)} modules, first {wrong[0]}")
        paths = token_paths(bound, prompts, generated)
        figures = compare_logits(bound, folder, kind, paths, torch.float32)
        report["logits"] = asdict(figures)
        if not figures.max_difference <= limit:  # the weights, or float32 arithmetic? float64 tells
            figures = compare_logits(bound, folder, kind, paths, torch.float64)
            report["logits_float64"] = asdict(figures)
        if not figures.max_difference <= limit:
            problems.append(f"max |dlogit| {figures.max_difference:.3g} is above {limit:.3g}")
        if figures.greedy_equal != figures.greedy_total and not half:
            problems.append(f"{figures.greedy_total - figures.greedy_equal} greedy tokens differ")
    report["problems"] = problems
    report["passed"] = not problems
    return report


def check(report: Mapping[str, Any]) -> None:
    """Raise ParityError when the report did not pass."""
    if not report["passed"]:
        raise ParityError(
            f"{report.get('path')}: does not compute what was trained",
            got="; ".join(report["problems"][:5]),
            hint="was it made from this base and this adapter?",
        )


def artefact_kind(folder: Path) -> str:
    """merged model, factors, deltas, adapter or onnx, by content. Raises InputError."""
    if any(folder.glob("*.onnx")):
        return "onnx"
    if (folder / "delta.safetensors").is_file():
        return "deltas"
    if (folder / "adapter_config.json").is_file():
        manifest = read_manifest(folder)
        converted = manifest is not None and manifest.get("artefact") == "adapter"
        native = read_json(folder / "adapter_config.json").get("peft_type") != "LORA"
        return "adapter" if converted or native else "factors"
    if any((folder / name).is_file() for name in CANDIDATES):
        return "merged model"
    raise InputError(f"{folder}: nothing to verify", expected="a merged model, factors, deltas or an ONNX export")


def _other_base(folder: Path, bound: BoundAdapter) -> list[str]:
    """A hint, not a verdict: the weights are compared one by one whatever the fingerprints say."""
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    stated = manifest.get("base", {}).get("fingerprint")
    if stated and stated != bound.base.fingerprint:
        return ["its manifest names a base of another fingerprint than this one"]
    return []


def _is_exact(folder: Path) -> bool:
    """False for truncated factors, whose weight errors are figures, not faults."""
    manifest = read_manifest(folder)
    return manifest is None or manifest.get("exact", True) is not False
