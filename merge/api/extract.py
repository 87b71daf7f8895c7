"""Extraction of a LoRA, or a LoRA with row scales, from a base and a fully fine-tuned checkpoint, with its error.

W0 is the base weight, W1 the fine-tuned one, both (out, in).

LoRA                dW = W1 - W0 ~ up down: the truncated SVD, the best approximation of its rank (Eckart-Young-Mirsky)
LoRA + row scale    W1 ~ diag(d) (W0 + up down), written as a DoRA with magnitude m = d rownorm(W0 + up down):
                    fine-tuning that scaled whole rows has a delta of full rank, but needs no rank as a row scale

The row-scaled form is fitted by alternating two steps until the error no longer falls: d by least squares for each row,
then the SVD of diag(1/d) W1 - W0. Tensors that are not matrices (norms, biases), and tensors whose shape changed, are
copied from the fine-tuned checkpoint. One weight is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.binding.embeddings import EMBEDDINGS
from adapter_merge.binding.fitting import CONV1D_MODELS
from adapter_merge.engine.devices import choose_device, exact_products
from adapter_merge.errors import InputError, MismatchError, NumericsError, Problem, raise_all
from adapter_merge.factoring.factor_folder import FolderConfig, WeightFactors, write_folder
from adapter_merge.factoring.truncated_svd import truncate
from adapter_merge.files.hashing import file_sha256
from adapter_merge.outputs.manifest import make_manifest, write_manifest
from adapter_merge.outputs.staging import check_output, staged
from adapter_merge.storage.checkpoint import Checkpoint, open_checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes
from adapter_merge.storage.tensor_io import read_tensor

from .options import ExtractOptions
from .results import ExtractResult

FIT_ROUNDS = 4  # of the alternating fit, at most
SMALL = 1e-12  # squared row norm below which a row keeps the scale 1


@dataclass(frozen=True)
class TensorPair:
    """One tensor in both checkpoints."""

    name: str
    before: TensorRef  # of the base
    after: TensorRef  # of the fine-tuned checkpoint

    @property
    def is_matrix(self) -> bool:
        """True for a float weight that both checkpoints store as a matrix of one shape."""
        return (
            len(self.before.shape) == 2
            and self.before.shape == self.after.shape
            and self.before.dtype in FLOAT_DTYPES
            and self.after.dtype in FLOAT_DTYPES
            and self.name.endswith(".weight")
            and min(self.before.shape) > 1
        )


def low_rank(
    before: Tensor,  # (out, in), float32
    after: Tensor,  # (out, in), float32
    rank: int | float,
) -> tuple[Tensor, Tensor]:
    """Return up (out, R), down (R, in): the best approximation of after - before with this rank or energy."""
    return truncate(after - before, rank)


def scaled_low_rank(
    before: Tensor,  # (out, in), float32
    after: Tensor,  # (out, in), float32
    rank: int | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return up (out, R), down (R, in), d (out,) so that diag(d) (before + up down) approximates `after`.

    The error is at most that of `low_rank`, which has d = 1.
    """
    up, down = low_rank(before, after, rank)
    best = (up, down, torch.ones_like(after[:, 0]))
    smallest = _measure_distance(before, after, *best)
    scale = _fit_row_scale(before, after)
    for _ in range(FIT_ROUNDS):
        up, down = truncate(after / scale[:, None] - before, rank)
        scale = _fit_row_scale(torch.addmm(before, up, down), after)
        distance = _measure_distance(before, after, up, down, scale)
        if not distance < smallest:
            break
        best, smallest = (up, down, scale), distance
    return best


def _fit_row_scale(direction: Tensor, after: Tensor) -> Tensor:
    """Return d (out,) that minimises ||after - diag(d) direction||; 1 for rows near zero and for d below 1e-3."""
    inner, square = (direction * after).sum(1), (direction * direction).sum(1)
    scale = inner / square.clamp_min(SMALL)
    return torch.where((square > SMALL) & (scale > 1e-3), scale, torch.ones_like(scale))


def _measure_distance(before: Tensor, after: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> float:
    """Return the Frobenius norm of diag(scale) (before + up down) - after."""
    return float(torch.linalg.vector_norm(torch.addmm(before, up, down) * scale[:, None] - after))


def extract(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    options: ExtractOptions = ExtractOptions(),
    *,
    progress: Callable[[int], None] | None = None,
) -> ExtractResult:
    """Write a PEFT folder (LoRA, or DoRA with `row_scale`) that approximates `finetuned` on `base`.

    base, finetuned: model folders or hub ids with the same tensor names. Weights W0 and W1 (out, in) are compared in
    float32; up (out, R) and down (R, in) are the truncated SVD of W1 - W0, the best approximation of that rank
    (Eckart-Young-Mirsky). progress: called with the bytes of each compared weight. Raises InputError for a wrong rank
    and where no matrix differs, MismatchError where `finetuned` lacks a tensor of the base, NumericsError for NaN or
    infinity, OutputError where the output exists.

    Example:
        >>> extract("base", "merged", "extracted", ExtractOptions(rank=0.99)).form
        'lora'
    """
    rank = options.rank
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise InputError("--rank is wrong", expected="a rank >= 1, or an energy between 0 and 1", got=str(rank))
    output = Path(output)
    base_checkpoint, tuned_checkpoint = open_checkpoint(base), open_checkpoint(finetuned)
    check_output(output, options.overwrite, (base_checkpoint.folder, tuned_checkpoint.folder))
    pairs, new = _pair_tensors(base_checkpoint, tuned_checkpoint)
    device = choose_device(options.device)
    content = make_manifest(
        "extracted adapter",
        {"base": _describe(base_checkpoint), "finetuned": _describe(tuned_checkpoint)},
        {"rank": rank, "row_scale": options.row_scale, "device": str(device)},
    )
    if options.dry_run:
        return ExtractResult(output, content | {"dry_run": True})
    conv1d = base_checkpoint.config.get("model_type") in CONV1D_MODELS
    factors: list[WeightFactors] = []
    layers: dict[str, dict[str, Any]] = {}
    replacements = {name: read_tensor(ref) for name, ref in new.items()}
    for pair in pairs:
        if not same_bytes(pair.before, pair.after):
            if pair.is_matrix:
                with exact_products(device):
                    factored = _factor_pair(pair, rank, options.row_scale, device, conv1d)
                if factored is not None:
                    weight_factors, error = factored
                    factors.append(weight_factors)
                    layers[weight_factors.module] = {"rank": weight_factors.rank, "relative_error": error}
            else:
                replacements[pair.name] = read_tensor(pair.after)
        if progress is not None:
            progress(pair.after.nbytes)
    if not factors and not replacements:
        raise InputError(f"{finetuned}: holds the same values as {base}, so there is nothing to extract")
    if not factors:
        raise InputError(
            f"{finetuned}: no matrix differs, only {len(replacements)} other tensors",
            hint="a LoRA cannot hold them: use the fine-tuned checkpoint itself",
        )
    content["form"] = "lora+row_scale" if any(item.magnitude is not None for item in factors) else "lora"
    content["layers"] = layers
    content["carried_over"] = sorted(replacements)
    name = base_checkpoint.config.get("_name_or_path")
    base_name = name if isinstance(name, str) and name else str(base)
    with staged(output, options.overwrite, base_checkpoint.snapshot + tuned_checkpoint.snapshot) as folder:
        settings = FolderConfig(base_name, _find_task_type(base_checkpoint), conv1d)
        write_folder(folder, factors, replacements, settings)
        content["files"] = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        write_manifest(folder, content)
    return ExtractResult(output, content)


def _pair_tensors(base: Checkpoint, finetuned: Checkpoint) -> tuple[list[TensorPair], dict[str, TensorRef]]:
    """Return the tensors of both, and those of `finetuned` alone. Raises MismatchError for tensors that it lacks."""
    missing = sorted(base.tensors.keys() - finetuned.tensors.keys())
    problems = [Problem(f"{finetuned.folder}: lacks {name}, which the base has") for name in missing[:10]]
    if len(missing) > 10:
        problems.append(Problem(f"... and {len(missing) - 10} more"))
    raise_all(problems, MismatchError)
    new = {name: ref for name, ref in finetuned.tensors.items() if name not in base.tensors}
    return [TensorPair(name, ref, finetuned.tensors[name]) for name, ref in base.tensors.items()], new


def _factor_pair(
    pair: TensorPair, rank: int | float, row_scale: bool, device: torch.device, conv1d: bool
) -> tuple[WeightFactors, float] | None:
    """Return one weight's factors and their relative error; None where both checkpoints hold the same values."""
    before = read_tensor(pair.before).to(device=device, dtype=torch.float32)
    after = read_tensor(pair.after).to(device=device, dtype=torch.float32)
    if not bool(torch.isfinite(after).all()) or not bool(torch.isfinite(before).all()):
        raise NumericsError(f"{pair.name}: holds NaN or infinity")
    embedding = pair.name.endswith(EMBEDDINGS)
    if conv1d and not embedding and not pair.name.endswith("lm_head.weight"):
        before, after = before.T.contiguous(), after.T.contiguous()
    change = float(torch.linalg.vector_norm(after - before))
    if change == 0:
        return None
    module = pair.name.removesuffix(".weight")
    magnitude = scale = None
    if row_scale and not embedding:
        up, down, scale = scaled_low_rank(before, after, rank)
        magnitude = (scale * torch.linalg.vector_norm(torch.addmm(before, up, down), dim=1)).cpu()
    else:
        up, down = low_rank(before, after, rank)
        if row_scale:  # a DoRA folder has a magnitude for every module; that of an embedding is per column
            magnitude = torch.linalg.vector_norm(torch.addmm(before, up, down), dim=0).cpu()
    applied = torch.ones_like(after[:, 0]) if scale is None else scale
    error = _measure_distance(before, after, up, down, applied) / change
    scale = None if scale is None else scale.cpu()
    return WeightFactors(module, up.cpu(), down.cpu(), magnitude, scale, embedding), error


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    name = checkpoint.config.get("_name_or_path") or checkpoint.folder.name
    return {
        "name": name,
        "path": str(checkpoint.folder),
        "fingerprint": checkpoint.fingerprint,
        "layout": checkpoint.layout,
    }


def _find_task_type(checkpoint: Checkpoint) -> str | None:
    """Return PEFT's task type for the checkpoint's architecture, None where it is unknown."""
    architectures: Any = checkpoint.config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    kinds: Mapping[str, str] = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
    return next((task for ending, task in kinds.items() if architecture.endswith(ending)), None)


def worst_error(content: Mapping[str, Any]) -> float:
    """Return the largest relative error of a manifest's layers; NaN where it has none."""
    return max((float(layer["relative_error"]) for layer in content["layers"].values()), default=math.nan)
