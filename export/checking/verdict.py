"""What all verifications of exports share: the live model, sample tokens, figures and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError, MismatchError
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.verification.compare_weights import WeightFigures

TOKENS = 256  # positions that are compared when no prompt is given
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 0.25, "bf16": 2.0}  # of the largest difference of a logit
CLOSE = 1e-3  # float32 cannot order two logits that are nearer to each other than this


def header(folder: Path, manifest: Manifest, chosen: str | None, adapter: str | Path | None) -> dict[str, Any]:
    """Return the entries of a report that name the inputs of a comparison; chosen: the adapter's name in the export."""
    return {
        "artefact": "onnx",
        "path": str(folder),
        "mode": manifest.mode,
        "precision": manifest.precision,
        "adapter": chosen or "base",
        "compared_with": "the adapter as trained, in torch float32" if adapter else "the base, in torch float32",
    }


def weights_report(
    has_adapter: bool, layers: Mapping[str, WeightFigures], compared: int, notes: list[str], problems: list[str]
) -> dict[str, Any]:
    """Return the entries of a report on a comparison of weights; layers: the relative error of dW by weight."""
    return {
        "compared_with": "the method's formula in float64" if has_adapter else "the base's weights",
        "layers": {name: asdict(layer) for name, layer in layers.items()},
        "half_precision": None,
        "compared": compared,
        "notes": notes,
        "problems": problems,
        "passed": not problems,
    }


def verdict(
    expected: Sequence[Any], got: Sequence[Any], base_logits: Sequence[Any], tolerance: float
) -> dict[str, Any]:
    """Return figures over logits (positions, vocabulary), one array per text, with all problems and the verdict.

    expected: of the live model with the adapter; got: of the export; base_logits: of the live model without the
    adapter. A difference as large as the adapter's effect (`expected` against `base_logits`) is a problem under any
    tolerance coarser than fp32's. Two greedy choices count as equal where their logits in `expected` differ by no more
    than CLOSE.
    """
    import numpy as np

    worst, total, count, effect, equal, positions = 0.0, 0.0, 0, 0.0, 0, 0
    for wanted, exported, base in zip(expected, got, base_logits, strict=True):
        positions += len(wanted)
        effect = max(effect, float(np.abs(wanted - base).max()))
        differences = np.abs(wanted - exported)
        if not np.isfinite(differences).all():
            worst = float("inf")
            continue
        worst = max(worst, float(differences.max()))
        total, count = total + float(differences.sum()), count + differences.size
        best, chosen, rows = wanted.argmax(-1), exported.argmax(-1), np.arange(len(wanted))
        equal += int(((best == chosen) | (wanted[rows, best] - wanted[rows, chosen] <= CLOSE)).sum())
    problems = []
    if not worst <= tolerance:
        problems.append(f"max |dlogit| {worst:.3g} is above {tolerance:.3g}")
    if tolerance > TOLERANCES["fp32"] and 0 < effect <= worst:
        problems.append(f"max |dlogit| {worst:.3g} is no less than the adapter's own effect, {effect:.3g}")
    if equal != positions and tolerance <= TOLERANCES["fp32"]:
        problems.append(f"{positions - equal} greedy choices differ")
    logits = {
        "max_difference": worst,
        "mean_difference": total / count if count else float("inf"),
        "greedy_equal": equal,
        "greedy_total": positions,
        "effect": effect,
    }
    return {"tolerance": tolerance, "logits": logits, "problems": problems, "passed": not problems}


def check_base(folder: Path, expected: str, got: str, base: str | Path) -> None:
    """Raise MismatchError when an export was not made from `base`; expected, got: fingerprints of checkpoints."""
    if expected != got:
        raise MismatchError(f"{folder}: not an export of {base}", expected=f"fingerprint {expected[:16]}", got=got[:16])


def find_adapter(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], adapter: str | Path | None, name: str | None, mode: str
) -> str | None:
    """Return the name of `adapter` in the export; None for the base.

    entries: the manifest's adapters by name. Raises InputError when the export has no such adapter, or several.
    """
    if mode == "merged" and len(entries) > 1:
        raise InputError(
            f"{folder}: it contains a merged combination, and verify compares it with one adapter",
            got=", ".join(entries),
            hint="merge the same combination with adapter-merge merge and verify that",
        )
    if adapter is None:
        if mode == "merged" and entries:
            raise InputError(
                f"{folder}: an adapter is merged into it", expected=", ".join(entries), got="no adapter to compare with"
            )
        return None
    if name is not None:
        if name not in entries:
            raise InputError(f"{folder}: no adapter named {name!r}", expected=", ".join(entries) or "none")
        return name
    if len(entries) == 1:
        return next(iter(entries))
    wanted = Path(adapter).resolve()
    matching = [key for key, entry in entries.items() if Path(entry["source"]).resolve() == wanted]
    if len(matching) != 1:
        raise InputError(
            f"{folder}: {adapter} is not the source of exactly one of its adapters",
            expected=", ".join(entries) or "none",
            hint="compare with the folder that was exported",
        )
    return matching[0]


def reference_model(
    base: str | Path, adapter: str | Path | None, base_kind: str | None = None, options: ReadOptions | None = None
) -> Any:
    """Return transformers' model in float32, with the unmerged adapter in it (None: the base alone)."""
    from adapter_merge.verification.live_adapter import load_model
    from adapter_merge.verification.live_model import trained_model

    if adapter is None:
        from adapter_merge.storage.checkpoint import resolve

        return load_model(resolve(base)).float()
    from adapter_merge.combine.open_inputs import open_pair

    return trained_model(open_pair(base, adapter, base_kind, options))


def sample_tokens(vocabulary: int, count: int = TOKENS) -> list[int]:
    """Return `count` deterministic token ids below `vocabulary`, spread over the vocabulary."""
    return [(7919 * (index + 1) + index * index) % vocabulary for index in range(count)]
