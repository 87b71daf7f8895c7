"""Comparison of another adapter (factors, a converted folder) with the adapter as trained: W' on the same base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.methods.lora import LoraModule
from adapter_merge.outputs.manifest import read_manifest
from adapter_merge.storage.checkpoint import read_weights
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.tensor_comparison import same_but_for_rounding
from adapter_merge.storage.tensor_io import read_tensor

from .compare_weights import WEIGHT_TOLERANCE, Progress, WeightFigures, WeightProof, compare_blocks, compare_each
from .opened_artefact import open_artefact
from .truncation import direction_and_scale, find_truncation_fault
from .unchanged_tensors import same_values
from .whole_formulas import formula_of, modules_by_tensor

ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
RECORDED_TOLERANCE = 1e-2  # relative, of a recorded error: it was computed in float32 before the factors were rounded
TRUNCATION = "truncated factors that are not the best of their rank"


def compare_adapters(
    bound: BoundAdapter, other: BoundAdapter, progress: Progress | None = None
) -> tuple[WeightProof, dict[str, tuple[BoundModule, BoundModule]]]:
    """Compare W', heads and biases of `bound` and of another adapter on the same base.

    Returns the proof, whose problems are those of heads and names, and the modules of both adapters by weight.
    """
    if isinstance(bound, CombinedBound):
        expected: dict[str, list[BoundModule]] = {item.name: [item] for item in bound.factor_modules()}
        combined_heads = bound.merged_tensors()
    else:
        expected, combined_heads = modules_by_tensor(bound), {}
    actual = modules_by_tensor(other)
    heads = sorted({*bound.replacements, *combined_heads, *other.replacements})
    different = [name for name in heads if not _same_head(name, bound, combined_heads, other)]
    extra = sorted(name for name in set(actual) - set(expected) if not all(map(_is_zero, actual[name])))
    missing = sorted(set(expected) - set(actual))
    saved = bound.adapter.base_layers
    layers_saved = [
        name
        for name, ref in other.adapter.base_layers.items()
        if not (name in saved and torch.equal(read_tensor(ref), read_tensor(saved[name])))
        and not (name in bound.base.tensors and same_but_for_rounding(ref, bound.base.tensors[name]))
    ]
    problems = [
        f"{len(names)} {problem}, first {names[0]}"
        for names, problem in (
            (layers_saved, "saved layers of the base are different"),
            (different, "heads or biases are different or missing"),
            (extra, "weights that the adapter does not change are changed"),
            (missing, "weights that the adapter changes are missing"),
        )
        if names
    ]
    if not any(ONE_EXPERT.search(module.name) for module in other.adapter.modules):  # vLLM's form, which PEFT converts
        problems += [problem.cause for problem in other.adapter.contradictions]  # PEFT reads these folders otherwise
    sources = Sources()

    def compare(name: str) -> WeightFigures:
        trained, other_formula = formula_of(expected[name], sources), formula_of(actual[name], sources)
        read_actual = lambda first, stop, base: other_formula.after(base, first)[0]  # noqa: E731
        return compare_blocks(expected[name][0].weight, trained, read_actual, "F64", sources)

    names = [name for name in expected if name in actual]
    try:
        layers = compare_each(names, compare, {name: expected[name][0].weight.nbytes for name in names}, progress)
    finally:
        sources.close()
    proof = WeightProof(layers, problems, len(layers) + len(heads))
    return proof, {name: (expected[name][0], actual[name][0]) for name in names}


def _is_zero(item: BoundModule) -> bool:
    """Return True for a plain LoRA with a factor of zeros: served experts that were not trained have such."""
    module = item.module
    if not isinstance(module, LoraModule) or len(module.refs) > 2 or module.own_magnitude:
        return False
    return not all(bool(read_tensor(ref).any()) for ref in module.refs)


def compare_factors(bound: BoundAdapter, folder: Path, progress: Progress | None = None) -> WeightProof:
    """Compare low-rank factors on the original base with the adapter: they must be exact, or the best of their rank.

    Truncated factors are compared with the optimum, which is computed from the adapter (`find_truncation_fault`). Where
    the folder's manifest names a calibration text, their error must be the recorded one, and the bounds are those of
    calibrated factors. No other statement of the folder is used.
    """
    other = open_artefact(bound, folder, "original")
    proof, pairs = compare_adapters(bound, other, progress)
    problems = [*proof.problems, *_check_files_beside(bound, other, folder)]
    inexact = [name for name, item in proof.layers.items() if not item.relative_error <= WEIGHT_TOLERANCE]
    recorded = calibrated_errors(folder)
    worse = []
    for name in inexact:
        reason = find_truncation_fault(*pairs[name], calibrated=recorded is not None)
        if reason is None and recorded is not None:
            stated = recorded.get(pairs[name][1].module.name)
            if stated is None or not proof.layers[name].relative_error <= stated * (1 + RECORDED_TOLERANCE):
                reason = f"relative error {proof.layers[name].relative_error:.3g}, recorded {stated}"
        if reason is not None:
            worse.append((name, reason))
    if worse:
        name, reason = worse[0]
        problems.append(f"{TRUNCATION}: {len(worse)} weights, first {name}: {reason}")
    return WeightProof(proof.layers, problems, proof.compared)


def calibrated_errors(folder: Path) -> dict[str, float] | None:
    """Return the relative errors by module that a folder of calibrated factors records; None for any other folder."""
    manifest = read_manifest(folder) or {}
    layers = manifest.get("layers")
    if not isinstance(manifest.get("calibration"), dict) or not isinstance(layers, dict):
        return None
    return {
        name: float(error)
        for name, figures in layers.items()
        if isinstance(figures, dict) and isinstance(error := figures.get("relative_error"), int | float)
    }


def _check_files_beside(bound: BoundAdapter, other: BoundAdapter, folder: Path) -> list[str]:
    """Return the problems of files beside the factors, for servers and exports, that contradict the factors."""
    problems = []
    heads = folder / REPLACEMENTS
    if heads.is_file():
        for ref in read_weights(heads).tensors:
            head = other.replacements.get(ref.name)
            if head is None or head.shape != ref.shape or not torch.equal(read_tensor(head), read_tensor(ref)):
                problems.append(f"{REPLACEMENTS}: {ref.name} differs from the tensor in the adapter's own file")
    scales = folder / "row_scale.safetensors"
    if scales.is_file():
        modules = {item.module.name: item for item in other.modules}
        stated_scales = {
            ref.name.removeprefix(PREFIX).removesuffix(".row_scale") for ref in read_weights(scales).tensors
        }
        problems += [
            f"row_scale.safetensors: lacks the scale of {name}"
            for name, item in modules.items()
            if name not in stated_scales and direction_and_scale(item)[1] is not None
        ]
        for ref in read_weights(scales).tensors:
            item = modules.get(ref.name.removeprefix(PREFIX).removesuffix(".row_scale"))
            scale = None if item is None else direction_and_scale(item)[1]
            scale = None if scale is None else scale.reshape(-1)
            stated = read_tensor(ref).to(torch.float64)
            if (
                scale is None
                or scale.shape != stated.shape
                or not bool(((stated - scale).abs() <= WEIGHT_TOLERANCE * scale.abs()).all())
            ):
                problems.append(f"row_scale.safetensors: {ref.name} does not follow from the factors and magnitudes")
    return problems


def _same_head(name: str, bound: BoundAdapter, combined: Mapping[str, Tensor], other: BoundAdapter) -> bool:
    """Return True where both adapters replace the tensor `name` by the same values."""
    head = other.replacements.get(name)
    if head is None:
        return False
    if name in combined:
        return combined[name].shape == head.shape and torch.equal(combined[name], read_tensor(head))
    if name not in bound.replacements:
        return False
    sources = Sources()
    try:
        return same_values(bound.replacements[name], head, sources)
    finally:
        sources.close()
