"""Shared parts of the verification of exports: live model, sample tokens, figures and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError, MismatchError
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.formats.stated_settings import ReadOptions

TOKENS = 256  # positions compared when no prompt is given
BARS: Mapping[str, float] = {"fp32": 1e-3, "fp16": 0.25, "bf16": 2.0}


CLOSE = 1e-3  # two best logits nearer than this: float32 itself cannot order them


def header(folder: Path, manifest: Manifest, chosen: str | None, adapter: str | Path | None) -> dict[str, Any]:
    """The inputs of a comparison."""
    return {
        "artefact": "onnx",
        "path": str(folder),
        "mode": manifest.mode,
        "precision": manifest.precision,
        "adapter": chosen or "base",
        "compared_with": "the adapter as trained, in torch float32" if adapter else "the base, in torch float32",
    }


def verdict(expected: Sequence[Any], got: Sequence[Any], plain: Sequence[Any], bar: float) -> dict[str, Any]:
    """Return figures over pairs of logits (positions, vocabulary), all problems, and the verdict.

    A greedy choice counts as different unless the two best expected logits are nearer than CLOSE. `plain` are the
    base's logits: the adapter's own effect is what would be lost without it.
    """
    import numpy as np

    worst, total, count, effect, equal, positions = 0.0, 0.0, 0, 0.0, 0, 0
    for wanted, mine, base in zip(expected, got, plain, strict=True):
        positions += len(wanted)
        effect = max(effect, float(np.abs(wanted - base).max()))
        gap = np.abs(wanted - mine)
        if not np.isfinite(gap).all():
            worst = float("inf")
            continue
        worst = max(worst, float(gap.max()))
        total, count = total + float(gap.sum()), count + gap.size
        best, chosen, rows = wanted.argmax(-1), mine.argmax(-1), np.arange(len(wanted))
        equal += int(((best == chosen) | (wanted[rows, best] - wanted[rows, chosen] <= CLOSE)).sum())
    problems = []
    if not worst <= bar:
        problems.append(f"max |dlogit| {worst:.3g} is above {bar:.3g}")
    if bar > BARS["fp32"] and 0 < effect <= worst:
        problems.append(f"max |dlogit| {worst:.3g} is no less than the adapter's own effect, {effect:.3g}")
    if equal != positions and bar <= BARS["fp32"]:
        problems.append(f"{positions - equal} greedy choices differ")
    logits = {
        "max_difference": worst,
        "mean_difference": total / count if count else float("inf"),
        "greedy_equal": equal,
        "greedy_total": positions,
        "effect": effect,
    }
    return {"tolerance": bar, "logits": logits, "problems": problems, "passed": not problems}


def check_base(folder: Path, expected: str, got: str, base: str | Path) -> None:
    """Raise MismatchError when an export was not made from `base`."""
    if expected != got:
        raise MismatchError(f"{folder}: not an export of {base}", expected=f"fingerprint {expected[:16]}", got=got[:16])


def find_adapter(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], adapter: str | Path | None, name: str | None, mode: str
) -> str | None:
    """Return the export's name of `adapter`. Raises InputError when it is unknown."""
    if mode == "merged" and len(entries) > 1:
        raise InputError(
            f"{folder}: a combination is merged into it, and it is held against one adapter alone",
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
            f"{folder}: which of its adapters is {adapter}?",
            expected=", ".join(entries) or "none",
            hint="say it by name",
        )
    return matching[0]


def reference_model(
    base: str | Path, adapter: str | Path | None, base_kind: str | None = None, options: ReadOptions | None = None
) -> Any:
    """Return the torch model in float32 with the adapter live in it."""
    from adapter_merge.verification.live_adapter import load_model
    from adapter_merge.verification.live_model import trained_model

    if adapter is None:
        from adapter_merge.storage.checkpoint import resolve

        return load_model(resolve(base)).float()
    from adapter_merge.combine.open_inputs import open_pair

    return trained_model(open_pair(base, adapter, base_kind, options))


def sample_tokens(vocabulary: int, count: int = TOKENS) -> list[int]:
    """Return reproducible token ids: a multiplicative walk over the vocabulary."""
    return [(7919 * (index + 1) + index * index) % vocabulary for index in range(count)]
