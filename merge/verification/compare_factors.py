"""Another adapter (factors, a converted folder) against the adapter as trained: W' of both on the same base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.outputs.staging import read_manifest
from adapter_merge.storage.checkpoint import read_weights
from adapter_merge.storage.input_files import Sources
from adapter_merge.storage.tensor_io import read_tensor

from .carried_over import same_values
from .compare_weights import WEIGHT_TOLERANCE, Progress, WeightFigures, WeightProof, compare_blocks, compare_each
from .opened_artefact import open_artefact
from .truncation import direction_and_scale, not_optimal
from .whole_formulas import formula_of, modules_by_tensor

RECORDED_TOLERANCE = 1e-2  # of a recorded error: it is computed in float32 from the factors before they are stored
TRUNCATION = "truncated factors that are not the best of their rank"


def adapter_weights(
    bound: BoundAdapter, other: BoundAdapter, progress: Progress | None = None
) -> tuple[WeightProof, dict[str, tuple[BoundModule, BoundModule]]]:
    """Another adapter (factors, a converted folder) on the same base: W' of both, heads and biases.

    Returns the proof, whose problems are those of heads and of names, and the weights of both by name.
    """
    if isinstance(bound, CombinedBound):
        wanted: dict[str, list[BoundModule]] = {item.name: [item] for item in bound.factor_modules()}
        whole = bound.merged_tensors()
    else:
        wanted, whole = modules_by_tensor(bound), {}
    theirs = modules_by_tensor(other)
    heads = sorted({*bound.replacements, *whole, *other.replacements})
    different = [name for name in heads if not _same_head(name, bound, whole, other)]
    extra, missing = sorted(set(theirs) - set(wanted)), sorted(set(wanted) - set(theirs))
    saved = bound.adapter.base_layers
    layers_saved = [
        name
        for name, ref in other.adapter.base_layers.items()
        if name in saved and not torch.equal(read_tensor(ref), read_tensor(saved[name]))
    ]
    problems = [
        f"{len(names)} {what}, first {names[0]}"
        for names, what in (
            (layers_saved, "saved layers of the base are different"),
            (different, "heads or biases are different or missing"),
            (extra, "weights that the adapter does not change are changed"),
            (missing, "weights that the adapter changes are missing"),
        )
        if names
    ]
    sources = Sources()

    def compare(name: str) -> WeightFigures:
        one, two = formula_of(wanted[name], sources), formula_of(theirs[name], sources)
        got = lambda first, stop, base: two.after(base, first)[0]  # noqa: E731
        return compare_blocks(wanted[name][0].weight, one, got, "F64", sources)

    names = [name for name in wanted if name in theirs]
    try:
        layers = compare_each(names, compare, {name: wanted[name][0].weight.nbytes for name in names}, progress)
    finally:
        sources.close()
    proof = WeightProof(layers, problems, len(layers) + len(heads))
    return proof, {name: (wanted[name][0], theirs[name][0]) for name in names}


def factor_weights(bound: BoundAdapter, folder: Path, progress: Progress | None = None) -> WeightProof:
    """Low-rank factors on the original base: exact, or the best of their rank.

    Truncated factors are held against the optimum, which is computed from the adapter (`not_optimal`). Where the
    folder's manifest names a calibration text, they must be as near as it says, and the bounds are those of calibrated
    factors. Nothing else that the folder says of itself is looked at.
    """
    other = open_artefact(bound, folder, "original")
    proof, pairs = adapter_weights(bound, other, progress)
    problems = [*proof.problems, *_beside_factors(bound, other, folder)]
    inexact = [name for name, one in proof.layers.items() if not one.relative_error <= WEIGHT_TOLERANCE]
    recorded = _calibrated_errors(folder)
    worse = []
    for name in inexact:
        reason = not_optimal(*pairs[name], calibrated=recorded is not None)
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


def _calibrated_errors(folder: Path) -> dict[str, float] | None:
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


def _beside_factors(bound: BoundAdapter, other: BoundAdapter, folder: Path) -> list[str]:
    """What lies beside the factors, for servers and exports: it must say the same as the factors themselves."""
    problems = []
    heads = folder / REPLACEMENTS
    if heads.is_file():
        for ref in read_weights(heads).tensors:
            own = other.replacements.get(ref.name)
            if own is None or own.shape != ref.shape or not torch.equal(read_tensor(own), read_tensor(ref)):
                problems.append(f"{REPLACEMENTS}: {ref.name} is not the one in the adapter's own file")
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
                problems.append(f"row_scale.safetensors: {ref.name} is not what the factors and magnitudes give")
    return problems


def _same_head(name: str, bound: BoundAdapter, whole: Mapping[str, Tensor], other: BoundAdapter) -> bool:
    found = other.replacements.get(name)
    if found is None:
        return False
    if name in whole:
        return whole[name].shape == found.shape and torch.equal(whole[name], read_tensor(found))
    if name not in bound.replacements:
        return False
    sources = Sources()
    try:
        return same_values(bound.replacements[name], found, sources)
    finally:
        sources.close()
