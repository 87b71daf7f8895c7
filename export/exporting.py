"""Choice of the exporter by the model's architecture and the requested mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import InputError
from adapter_merge.export.building.checks_before_build import silent
from adapter_merge.quantisation.dense_view import open_base

if TYPE_CHECKING:
    from adapter_merge.combine.recipe import Recipe

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
    force: bool = False,
    recipe: Recipe | None = None,
    check: bool = True,
    pooling: str | None = None,
    normalize: bool = False,
    say: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Export `base` with `adapters` to `output`; return the report (see the functions of the three modes).

    recipe: merged only, how the adapters are combined; their plain sum when not given. force: use adapters where
    evidence contradicts the base. check: compare the export with the live model, base and every adapter, before it is
    published. say: gets a line per step.

    Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError before long work.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}", expected=", ".join(MODES))
    if recipe is not None and mode != "merged":
        raise InputError(f"a {mode} export keeps its adapters apart: nothing to combine", expected="--mode merged")
    architecture = (open_base(base).config.get("architectures") or ["(none)"])[0]
    from adapter_merge.export.graph.encoder_task import ENCODERS, TRACED

    options: dict[str, Any] = {
        "precision": precision,
        "device": device,
        "overwrite": overwrite,
        "dry_run": dry_run,
        "check": check,
        "say": say,
        "force": force,
    }
    if (pooling is not None or normalize) and architecture not in ENCODERS:
        raise InputError(f"{architecture} pools nothing", expected="an encoder with --pooling or --normalize")
    if normalize and pooling in (None, "none"):
        raise InputError("--normalize without a pooling", expected="--pooling mean, cls, max or last beside it")
    if architecture in TRACED:
        from adapter_merge.export.modes.traced import export_traced

        return export_traced(
            base, adapters, output, mode=mode, recipe=recipe, pooling=pooling, normalize=normalize, **options
        )
    if mode == "merged":
        from adapter_merge.export.modes.merged import export_merged

        return export_merged(base, adapters, output, recipe=recipe, **options)
    if mode == "switchable":
        from adapter_merge.export.modes.switchable import export_switchable

        return export_switchable(base, adapters, output, **options)
    from adapter_merge.export.modes.batched import export_batched

    return export_batched(base, adapters, output, **options)
