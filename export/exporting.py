"""Which way a model takes to ONNX, by its architecture and by what is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.merge.checkpoint import open_checkpoint
from adapter_merge.merge.errors import InputError

MODES = ("merged", "switchable", "batched")


def export_model(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    mode: str = "merged",
    precision: str = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Export `base` with `adapters` to `output`; figures of what was done (see the three modes' functions).

    Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError before long work.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}", expected=", ".join(MODES))
    architecture = (open_checkpoint(base).config.get("architectures") or ["(none)"])[0]
    from .traced import TRACED, export_traced

    options: dict[str, Any] = {
        "precision": precision,
        "device": device,
        "overwrite": overwrite,
        "dry_run": dry_run,
    }
    if architecture in TRACED:
        return export_traced(base, adapters, output, mode=mode, **options)
    if mode == "merged":
        from .merged import export_merged

        return export_merged(base, adapters, output, **options)
    if mode == "switchable":
        from .switchable import export_switchable

        return export_switchable(base, adapters, output, **options)
    from .batched import export_batched

    return export_batched(base, adapters, output, **options)
