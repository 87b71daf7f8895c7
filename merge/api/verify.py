"""Verification that an artefact computes what the adapter was trained to compute: `adapter-merge verify`.

weights   every adapted weight is compared with its method's formula in float64, all other tensors byte for byte with
          the base
logits    logits and greedy tokens of the artefact are compared with those of the live, unmerged adapter, on prompts and
          on the tokens that the adapter generates

Both comparisons stream the layers, so that no model is in memory as a whole. The artefact's own manifest does not
decide what is compared or what passes. No library runs a combination live: each of its adapters is compared live, and
the combination with its formula.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.base_weights import check_whole_base, find_changed_weights
from adapter_merge.combine.open_inputs import AdapterInput, open_pair, parts_of
from adapter_merge.combine.recipe import Recipe
from adapter_merge.errors import InputError, ParityError
from adapter_merge.outputs.manifest import read_manifest
from adapter_merge.outputs.unlisted_files import holds_graph
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import CANDIDATES, read_json, resolve
from adapter_merge.verification.compare_factors import TRUNCATION, calibrated_errors, compare_adapters, compare_factors
from adapter_merge.verification.compare_logits import compare_logits, token_paths
from adapter_merge.verification.compare_weights import (
    WEIGHT_TOLERANCE,
    Progress,
    WeightProof,
    compare_deltas,
    compare_merged,
    find_weight_problems,
)
from adapter_merge.verification.live_adapter import require_tokens
from adapter_merge.verification.live_probes import find_formula_errors
from adapter_merge.verification.opened_artefact import open_artefact
from adapter_merge.verification.own_quantiser import quantiser_note
from adapter_merge.verification.requantised_weights import requantised_weights
from adapter_merge.verification.side_files import changed_side_files, find_program_problems, find_tokenizer_problems
from adapter_merge.verification.streamed_adapter import streamed_trained

from .options import VerifyOptions
from .results import Verification

LOGIT_TOLERANCE = 1e-4


def verify(
    base: str | Path | None,
    adapter: AdapterInput,
    artefact: str | Path,
    options: VerifyOptions = VerifyOptions(),
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Compare `artefact` (merged model, deltas, factors, converted adapter, ONNX export) with `adapter` on `base`.

    Every adapted weight (out, in) is compared with its method's formula in float64, all other tensors byte for byte
    with the base, and logits and greedy tokens with those of the live, unmerged adapter. progress: called with the
    bytes of each compared weight. say: called with a text for each step. A difference is not raised: `passed` is False
    and `problems` lists it. Raises InputError where `artefact` is no artefact, AdapterError or MismatchError where the
    adapter does not fit the base, MissingDependencyError where the extra `verify` (or `onnx`) is not installed.

    Example:
        >>> report = verify("base", "adapter", "merged")
        >>> assert report.passed, report.problems
    """
    folder = resolve(artefact)
    kind = artefact_kind(folder)
    bound = open_pair(base, adapter, options.base_kind, options.reading)
    if kind == "onnx":
        if isinstance(adapter, Recipe):
            raise InputError(
                f"{folder}: an ONNX folder is compared with one adapter at a time", hint="verify it with each adapter"
            )
        stated = {"base_kind": options.base_kind, "options": options.reading}
        inputs = bound.base.folder, bound.adapter.folder, folder
        if options.weights_only:
            weights = importlib.import_module(
                "adapter_merge.export.checking.weight_proof"
            )  # by name: see pyproject.toml
            return Verification(weights.verify_weights(*inputs, progress=progress, **stated))
        exported = importlib.import_module("adapter_merge.export.checking.verification")
        sampled = {"prompts": options.prompts, "generated": options.generated, "tolerance": options.tolerance}
        return Verification(exported.verify_onnx(*inputs, **sampled, **stated))
    report: dict[str, Any] = {
        "artefact": kind,
        "path": str(folder),
        "adapter": {
            "path": ", ".join(str(part.adapter.folder) for part in parts_of(bound)),
            "method": str(bound.adapter.method),
        },
        "base": {"path": str(bound.base.folder), "kind": bound.base_kind, "evidence": bound.evidence},
    }
    for part in parts_of(bound):
        check_whole_base(part)
    bases, notes = _compare_bases(folder, bound)
    report["notes"] = [*notes, *bound.base.notes]
    if bound.base.stored is not None and not options.weights_only:
        report["notes"].append(quantiser_note(bound.base))
    proof = _prove_weights(bound, folder, kind, options.min_retention, progress)
    report["layers"] = {name: asdict(figures) for name, figures in proof.layers.items()}
    report["half_precision"], report["compared"] = proof.half, proof.compared
    problems = [*bases, *proof.problems]
    if kind == "factors":
        report["notes"] += _truncation_notes(proof, folder)
    if kind == "merged model":
        report["notes"] += changed_side_files(bound, open_base(folder))
        problems += find_program_problems(bound, open_base(folder))
        problems += [] if options.weights_only else find_tokenizer_problems(bound, folder, options.prompts)
    if not proof.compared:
        problems.append("nothing was compared: the artefact and the adapter have no tensor in common")
    if not options.weights_only:
        truncated = kind == "factors" and bool(_truncation_notes(proof, folder))
        rounded = proof.half is not None or proof.is_requantised or truncated
        limit = options.tolerance if options.tolerance is not None else (math.inf if rounded else LOGIT_TOLERANCE)
        report["tolerance"] = None if math.isinf(limit) else limit
        figures, logit_problems = _prove_logits(bound, folder, kind, limit, options.prompts, options.generated, say)
        report |= figures
        if options.tolerance is not None and kind == "factors":  # the user's tolerance decides on a truncation
            problems = [problem for problem in problems if not problem.startswith(TRUNCATION)]
        problems += logit_problems
        last = figures.get("logits_float64") or figures["logits"]
        if last["greedy_equal"] != last["greedy_total"] and not rounded and limit <= LOGIT_TOLERANCE:
            problems.append(f"{last['greedy_total'] - last['greedy_equal']} greedy tokens differ")
    report["problems"] = problems
    report["passed"] = not problems
    return Verification(report)


def _truncation_notes(proof: WeightProof, folder: Path) -> list[str]:
    """Return a note on the error of truncated factors; none where the factors are exact or have problems."""
    errors = [item.relative_error for item in proof.layers.values() if not item.relative_error <= WEIGHT_TOLERANCE]
    if not errors or proof.problems:
        return []
    if calibrated_errors(folder) is None:
        text = "the best of their rank"
    else:
        text = "cut for a text, as their folder says: that they are the best for it was not checked"
    return [f"{len(errors)} weights are truncated, off by up to {max(errors):.2g} of the trained dW: {text}"]


def _prove_weights(
    bound: BoundAdapter, folder: Path, kind: str, least: float, progress: Progress | None
) -> WeightProof:
    """Compare the weights of an artefact of `kind` with the adapter's formulas."""
    if kind == "merged model":
        merged = open_base(folder)
        if merged.stored is not None:
            return requantised_weights(bound, merged, least, progress)
        return compare_merged(bound, merged, progress)
    if kind == "deltas":
        return compare_deltas(bound, folder, progress)
    if kind == "factors":
        return compare_factors(bound, folder, progress)
    proof, _ = compare_adapters(bound, open_artefact(bound, folder, bound.base_kind), progress)
    return WeightProof(proof.layers, [*proof.problems, *find_weight_problems(proof.layers)], proof.compared)


def _prove_logits(
    bound: BoundAdapter,
    folder: Path,
    kind: str,
    limit: float,
    prompts: Sequence[str] | None,
    generated: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[str]]:
    """Compare the live layers with the formulas, then the logits; return the figures and the problems."""
    problems: list[str] = []
    require_tokens(bound.base.folder)
    say("live layers of the adapter as trained, in float64")
    wrong = [
        name for part in parts_of(bound) for name in find_formula_errors(part, streamed_trained(part, torch.float64))
    ]
    if wrong:
        problems.append(f"the live adapter computes other weights in {len(wrong)} tensors, first {wrong[0]}")
    paths = token_paths(bound, prompts, generated, say)
    figures = compare_logits(bound, folder, kind, paths, torch.float32, say)
    report = {"logits": asdict(figures)}
    if not figures.max_difference <= limit:  # float64 shows whether float32 arithmetic causes the difference
        figures = compare_logits(bound, folder, kind, paths, torch.float64, say)
        report["logits_float64"] = asdict(figures)
    if not figures.max_difference <= limit:
        problems.append(f"max |dlogit| {figures.max_difference:.3g} is above {limit:.3g}")
    return report, problems


def check(verification: Verification) -> None:
    """Raise ParityError where the artefact did not pass."""
    if not verification.passed:
        raise ParityError(
            f"{verification.as_json().get('path')}: does not compute what was trained",
            got="; ".join(verification.problems[:5]),
            hint="was it made from this base and this adapter?",
        )


def artefact_kind(folder: Path) -> str:
    """Return "merged model", "factors", "deltas", "adapter" or "onnx", found by the folder's files.

    Raises InputError for a folder of none of these kinds, or of several.
    """
    kinds = []
    if holds_graph(folder):
        kinds.append("onnx")
    if (folder / "delta.safetensors").is_file():
        kinds.append("deltas")
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        kinds.append("factors" if config.get("peft_type") == "LORA" and _starts_at_zero(config) else "adapter")
    if (folder / "adapter.gguf").is_file():
        kinds.append("factors")
    if any((folder / name).is_file() for name in CANDIDATES):
        kinds.append("merged model")
    if len(kinds) > 1:
        raise InputError(f"{folder}: holds several kinds of artefact", expected="one of them", got=", ".join(kinds))
    if not kinds:
        raise InputError(f"{folder}: nothing to verify", expected="a merged model, factors, deltas or an ONNX export")
    return kinds[0]


def _starts_at_zero(config: Mapping[str, Any]) -> bool:
    """Tell whether the LoRA starts at zero; PiSSA, OLoRA and others do not, and act on a residual."""
    return config.get("init_lora_weights", True) in (True, False, "gaussian", None)


def _compare_bases(folder: Path, bound: BoundAdapter) -> tuple[list[str], list[str]]:
    """Return problems and notes on the base that the artefact's manifest names.

    Another fingerprint with the same layout is a problem: the artefact was made from other base weights. An equal
    fingerprint proves nothing, because the artefact states it; the weights are compared in any case.
    """
    manifest = read_manifest(folder)
    stated = (manifest or {}).get("base") or {}
    notes = [
        f"forced against evidence: {cause}"
        for part in parts_of(bound)
        for cause in (problem.cause for problem in part.origin.contradictions)
    ]
    other = [problem.cause for part in parts_of(bound) for problem in find_changed_weights(part, folder)]
    if other or not stated.get("fingerprint") or stated["fingerprint"] == bound.base.fingerprint:
        return ["its manifest names another base: the same tensors with other values"] if other else [], notes
    if stated.get("layout") == bound.base.layout:
        return ["its manifest names another base: the same tensors with other values"], notes
    return [], [*notes, "its manifest states another fingerprint than that of the base"]
