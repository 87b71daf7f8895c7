"""`export --add`: adds adapters to an existing export. The weights file of the base is never changed.

Switchable: one small file is written, the graph stays. Batched: the stacks of factors are written anew with one
slot more, and the graph that refers to them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError, MismatchError, OutputError
from adapter_merge.quantisation.dense_view import open_base

from .adapter_file import aligned, match_all
from .adapter_source import factors_of
from .batched import restack
from .folder import Manifest, folder_layout, read_export, write_manifest
from .request import figures
from .runtime import check_packages
from .switchable import write_adapters
from .targets import Layout


def add_adapters(
    folder: Path, adapters: Mapping[str, Path], *, base: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Add `adapters` to the switchable or batched export in `folder`; return the report.

    The base is needed where an adapter is not in factor form yet (DuDe and DoRA read the rows they scale):
    the folder that the export was made from, or `base`. Raises MismatchError when that is another base, and
    InputError, OutputError or MismatchError before anything is written.
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
    taken = [name for name in adapters if name in manifest.adapters]
    if taken and not overwrite:
        raise OutputError(f"{folder} has adapters of these names: {', '.join(taken)}", hint="--overwrite")
    checkpoint_folder = base_of(folder, manifest, layout, base)
    factors = {name: factors_of(checkpoint_folder, source) for name, source in adapters.items()}
    match_all(factors, layout)
    factors = {name: aligned(value, layout) for name, value in factors.items()}
    if layout.mode == "batched":
        entries = restack(folder, layout, factors, adapters)
    else:
        entries = write_adapters(factors, adapters, layout, folder)
    for name, entry in entries.items():
        manifest.adapters[name] = {**manifest.adapters.get(name, {}), **entry}
    write_manifest(folder, manifest)
    return {
        "mode": layout.mode,
        "output": str(folder),
        "adapters": {name: figures(value) for name, value in factors.items()},
        "adapter_bytes": {name: entry["bytes"] for name, entry in entries.items() if "bytes" in entry},
        "seconds": round(time.perf_counter() - started, 2),
    }


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
