"""A LoRA, or a LoRA with row scales, out of two full checkpoints: what fine-tuning did, in few numbers, with its error.

LoRA                dW = W1 - W0 ~ up down: truncated SVD, the best of its rank (Eckart-Young-Mirsky)
LoRA + row scale    W1 ~ diag(d) (W0 + up down), written as a DoRA (m = d rownorm(W0 + up down)): fine-tuning that
                    changed the sizes of whole rows is of full rank as a delta, and of none as a scale

The second is fitted by turns, each of which lowers the error or is not taken: d row by row (least squares), then the
SVD of diag(1/d) W1 - W0. Tensors that are no matrices (norms, biases), and those whose shape changed, are carried over
as they are. One weight at a time is held.
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
from adapter_merge.outputs.staging import check_output, manifest, sha256, staged, write_manifest
from adapter_merge.storage.checkpoint import Checkpoint, open_checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes
from adapter_merge.storage.tensor_io import read_tensor

from .options import ExtractOptions
from .results import ExtractResult

TURNS = 4
SMALL = 1e-12


@dataclass(frozen=True)
class TensorPair:
    """One weight in both checkpoints."""

    name: str
    before: TensorRef
    after: TensorRef

    @property
    def is_matrix(self) -> bool:
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
    """up (out, R), down (R, in): the best approximation of after - before of that rank or energy."""
    return truncate(after - before, rank)


def scaled_low_rank(
    before: Tensor,  # (out, in), float32
    after: Tensor,  # (out, in), float32
    rank: int | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """up (out, R), down (R, in), d (out,): diag(d) (before + up down) near `after`, never worse than d = 1."""
    up, down = low_rank(before, after, rank)
    best = (up, down, torch.ones_like(after[:, 0]))
    smallest = _distance(before, after, *best)
    # Start from the rows' own sizes: what a magnitude would change, before any direction does.
    scale = _row_fit(before, after)
    for _ in range(TURNS):
        up, down = truncate(after / scale[:, None] - before, rank)
        scale = _row_fit(torch.addmm(before, up, down), after)
        distance = _distance(before, after, up, down, scale)
        if not distance < smallest:
            break
        best, smallest = (up, down, scale), distance
    return best


def _row_fit(direction: Tensor, after: Tensor) -> Tensor:
    """d (out,) that minimises ||after - diag(d) direction|| row by row; 1 where a row gives nothing to go by."""
    inner, square = (direction * after).sum(1), (direction * direction).sum(1)
    scale = inner / square.clamp_min(SMALL)
    return torch.where((square > SMALL) & (scale > 1e-3), scale, torch.ones_like(scale))


def _distance(before: Tensor, after: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> float:
    return float(torch.linalg.vector_norm(torch.addmm(before, up, down) * scale[:, None] - after))


def extract(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    options: ExtractOptions = ExtractOptions(),
    *,
    progress: Callable[[int], None] | None = None,
) -> ExtractResult:
    """Write the PEFT folder that turns `base` into `finetuned` (model folders or hub ids) as well as its rank allows.

    Weights (out, in) are compared in float32; the truncated SVD of a difference is the best approximation of its rank
    (Eckart-Young-Mirsky). progress: called with the bytes of each weight. Raises AdapterMergeError.

    Example:
        >>> extract("base", "merged", "extracted", ExtractOptions(rank=0.99)).form
        'lora'
    """
    rank = options.rank
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise InputError("--rank is wrong", expected="a rank >= 1, or an energy between 0 and 1", got=str(rank))
    output = Path(output)
    one, two = open_checkpoint(base), open_checkpoint(finetuned)
    check_output(output, options.overwrite, (one.folder, two.folder))
    pairs, new = _pairs(one, two)
    chosen = choose_device(options.device)
    content = manifest(
        "extracted adapter",
        {"base": _describe(one), "finetuned": _describe(two)},
        {"rank": rank, "row_scale": options.row_scale, "device": str(chosen)},
    )
    if options.dry_run:
        return ExtractResult(output, content | {"dry_run": True})
    conv1d = one.config.get("model_type") in CONV1D_MODELS
    factors: list[WeightFactors] = []
    layers: dict[str, dict[str, Any]] = {}
    replacements = {name: read_tensor(ref) for name, ref in new.items()}
    for pair in pairs:
        if not same_bytes(pair.before, pair.after):
            if pair.is_matrix:
                with exact_products(chosen):
                    found = _factors(pair, rank, options.row_scale, chosen, conv1d)
                if found is not None:
                    factors.append(found[0])
                    layers[found[0].module] = {"rank": found[0].rank, "relative_error": found[1]}
            else:
                replacements[pair.name] = read_tensor(pair.after)
        if progress is not None:
            progress(pair.after.nbytes)
    if not factors and not replacements:
        raise InputError(f"{finetuned}: holds the same values as {base}: there is nothing to extract")
    if not factors:
        raise InputError(
            f"{finetuned}: no matrix differs, only {len(replacements)} other tensors",
            hint="a LoRA has nothing to hold: keep the checkpoint",
        )
    content["form"] = "lora+row_scale" if any(item.magnitude is not None for item in factors) else "lora"
    content["layers"] = layers
    content["carried_over"] = sorted(replacements)
    name = one.config.get("_name_or_path")
    with staged(output, options.overwrite, one.snapshot + two.snapshot) as folder:
        said = FolderConfig(name if isinstance(name, str) and name else str(base), _task(one), conv1d)
        write_folder(folder, factors, replacements, said)
        content["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        write_manifest(folder, content)
    return ExtractResult(output, content)


def _pairs(one: Checkpoint, two: Checkpoint) -> tuple[list[TensorPair], dict[str, TensorRef]]:
    """Weights in both, and tensors that only the second has. Raises MismatchError for what the second lacks."""
    missing = sorted(one.tensors.keys() - two.tensors.keys())
    problems = [Problem(f"{two.folder}: lacks {name}, which the base has") for name in missing[:10]]
    if len(missing) > 10:
        problems.append(Problem(f"... and {len(missing) - 10} more"))
    raise_all(problems, MismatchError)
    new = {name: ref for name, ref in two.tensors.items() if name not in one.tensors}
    return [TensorPair(name, one.tensors[name], two.tensors[name]) for name in one.tensors], new


def _factors(
    pair: TensorPair, rank: int | float, row_scale: bool, device: torch.device, conv1d: bool
) -> tuple[WeightFactors, float] | None:
    """The factors of one weight and their relative error; None where the values are the same in another dtype."""
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
        if row_scale:  # a DoRA folder has magnitudes everywhere; an embedding's are per column
            magnitude = torch.linalg.vector_norm(torch.addmm(before, up, down), dim=0).cpu()
    error = _distance(before, after, up, down, torch.ones_like(after[:, 0]) if scale is None else scale) / change
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


def _task(checkpoint: Checkpoint) -> str | None:
    architectures: Any = checkpoint.config.get("architectures")
    said = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    kinds: Mapping[str, str] = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
    return next((task for ending, task in kinds.items() if said.endswith(ending)), None)


def worst_error(content: Mapping[str, Any]) -> float:
    """The largest relative error of a manifest's layers."""
    return max((float(layer["relative_error"]) for layer in content["layers"].values()), default=math.nan)
