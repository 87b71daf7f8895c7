"""`export --add`: adds adapters to an existing export. The weights file of the base is never changed.

Switchable: one small file is written, the graph stays. Batched: the stacks of factors are written anew with one
slot more, and the graph that refers to them. A lock lets one command at a time change the folder, and the change is one
atomic step (folder/atomic_change.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import InputError, MismatchError, OutputError
from adapter_merge.export.building.checks_before_build import figures, silent
from adapter_merge.export.checking.parity import compare_all, compare_encoders
from adapter_merge.export.engine.decoder_session import Decoder
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.atomic_change import commit, hidden, recover
from adapter_merge.export.folder.contents import folder_layout, read_export
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.adapter_file import SUFFIX, aligned, match_all
from adapter_merge.export.graph.adapter_source import factors_of
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.targets import Layout
from adapter_merge.export.modes.batched import restack
from adapter_merge.export.modes.switchable import write_adapters
from adapter_merge.files.locks import locked
from adapter_merge.outputs.staging import disk_errors
from adapter_merge.quantisation.dense_view import open_base

PATIENCE = 3600.0  # seconds for the adds before this one


def add_adapters(
    folder: Path,
    adapters: Mapping[str, Path],
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    say: Callable[[str], None] = silent,
    force: bool = False,
) -> dict[str, Any]:
    """Add `adapters` to the switchable or batched export in `folder`; return the report.

    The base is needed where an adapter is not in factor form yet (DuDe and DoRA read the rows they scale), and for
    the `check` against the live model: the folder that the export was made from, or `base`. Several runs at a time
    add one after the other. Raises MismatchError when the base is another one or an answer differs from the live
    model's, InputError or OutputError, with the folder as it was.
    """
    started = time.perf_counter()
    check_packages("onnx_ir")
    layout = folder_layout(folder)
    if layout.mode == "merged":
        raise InputError(
            f"{folder}: a merged export takes no more adapters",
            expected="an export made with --mode switchable or batched",
        )
    manifest = read_export(folder)
    if layout.mode == "batched" and manifest.kind == "encoder":
        raise InputError(
            f"{folder}: a batched encoder takes no more adapters",
            expected="an encoder exported with --mode switchable",
            hint="export again with all adapters",
        )
    _check_names(folder, manifest, adapters, overwrite)
    checkpoint = base_of(folder, manifest, layout, base)
    factors = {name: factors_of(checkpoint, source, force) for name, source in adapters.items()}
    match_all(factors, layout)
    report = {
        "mode": layout.mode,
        "precision": layout.precision,
        "base": str(checkpoint),
        "output": str(folder),
        "adapters": {name: figures(value) for name, value in factors.items()},
    }
    if dry_run:
        return {**report, "dry_run": True}
    with locked(folder, patience=PATIENCE), disk_errors(folder, "the export is as it was"):
        recover(folder)
        layout, manifest = folder_layout(folder), read_export(folder)  # another run may have added one meanwhile
        _check_names(folder, manifest, adapters, overwrite)
        try:
            entries, files = _write_hidden(folder, layout, factors, adapters)
            parity = _compare(folder, manifest, checkpoint, adapters, say) if check else {}
        except BaseException:
            recover(folder)
            raise
        commit(folder, files, entries, parity)
    return {
        **report,
        "adapter_bytes": {name: entry["bytes"] for name, entry in entries.items() if "bytes" in entry},
        "parity": parity,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _check_names(folder: Path, manifest: Manifest, adapters: Mapping[str, Path], overwrite: bool) -> None:
    taken = [name for name in adapters if name in manifest.adapters]
    if taken and not overwrite:
        raise OutputError(f"{folder} has adapters of these names: {', '.join(taken)}", hint="--overwrite")


def _write_hidden(
    folder: Path, layout: Layout, factors: Mapping[str, Factors], sources: Mapping[str, Path]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Write the new files under hidden names; return the manifest's entries and the files' own names."""
    factors = {name: aligned(value, layout) for name, value in factors.items()}
    if layout.mode == "batched":
        return restack(folder, layout, factors, sources), ["model.onnx"]
    entries = write_adapters(factors, sources, layout, folder, hide=True)
    return entries, [entry["file"] for entry in entries.values()]


def _compare(
    folder: Path, manifest: Manifest, checkpoint: Path, adapters: Mapping[str, Path], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Compare the new adapters, as they lie under hidden names, with the live model."""
    references = {name: open_pair(checkpoint, source) for name, source in adapters.items()}
    files = {name: hidden(folder / f"{name}{SUFFIX}") for name in adapters}
    if manifest.kind != "decoder":
        return compare_encoders(checkpoint, references, folder, manifest, say, files)
    graph = hidden(folder / "model.onnx")
    decoder = Decoder(folder, graph=graph if manifest.mode == "batched" else None)
    if manifest.mode == "switchable":
        for name, file in files.items():
            decoder.load_file(name, file)
    return compare_all(decoder, checkpoint, references, manifest.precision, say)


def base_of(folder: Path, manifest: Manifest, layout: Layout, base: str | Path | None) -> Path:
    """Open the base checkpoint of an export, checked by its fingerprint. Raises InputError or MismatchError."""
    source = Path(manifest.base) if base is None else base
    try:
        checkpoint = open_base(source)
    except InputError as error:
        if base is not None:
            raise
        raise InputError(
            f"{folder}: its base is not where it was",
            expected=str(manifest.base),
            got=str(error),
            hint="give it with --base",
        ) from error
    if checkpoint.fingerprint != layout.base:
        raise MismatchError(
            f"{source}: not the base of {folder}",
            expected=f"fingerprint {layout.base[:16]}",
            got=checkpoint.fingerprint[:16],
        )
    return checkpoint.folder
