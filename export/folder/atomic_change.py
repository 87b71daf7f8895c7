"""The atomic change of an export by `--add`: files under hidden names, then a journal that lists the renames.

Before the journal has its final name, the export is unchanged. Afterwards the change will be completed, by this run or
by the next one: each file is renamed once, the manifest is written last, and then the journal is removed. A process
that is killed at any moment leaves the old export, the new one, or a journal from which the next run continues.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.outputs.staging import sync_folder, write_json
from adapter_merge.storage.checkpoint import read_json

from .contents import read_export, write_manifest

JOURNAL = ".adapter_merge_add.json"
STACKS = re.compile(r"adapters(\.\d+)?\.onnx\.data")


def hidden(file: Path) -> Path:
    """Return the name under which a file is written before the journal is complete."""
    return file.with_name(f".{file.name}.new")


def commit(
    folder: Path,
    files: list[str],
    entries: Mapping[str, Mapping[str, Any]],
    parity: Mapping[str, Mapping[str, Any]],
) -> None:
    """Rename `files` from their hidden names to their own, and add `entries` and `parity` to the manifest."""
    journal = folder / JOURNAL
    hidden(journal).unlink(missing_ok=True)
    content = {"files": files, "entries": dict(entries), "parity": dict(parity)}
    write_json(hidden(journal), content)
    hidden(journal).rename(journal)
    sync_folder(folder)
    recover(folder)


def recover(folder: Path) -> None:
    """Complete the change of an existing journal, and remove the hidden files of a run that was killed before it."""
    journal = folder / JOURNAL
    if journal.is_file():
        content = read_json(journal)
        for name in content["files"]:
            if hidden(folder / name).is_file():
                hidden(folder / name).replace(folder / name)
        remove_unused_stacks(folder)
        manifest = read_export(folder)
        for name, entry in content["entries"].items():
            manifest.adapters[name] = {**manifest.adapters.get(name, {}), **entry}
        manifest.parity |= content["parity"]
        write_manifest(folder, manifest)
        journal.unlink()
    for file in folder.glob(".*.new"):
        file.unlink()
    remove_unused_stacks(folder)


def remove_unused_stacks(folder: Path) -> None:
    """Remove stacks of factors that the graph does not read."""
    import onnx_ir as ir

    stacks = [path for path in folder.iterdir() if STACKS.fullmatch(path.name)]
    if not stacks:
        return
    values = ir.load(folder / "model.onnx").graph.initializers.values()
    read = {str(value.const_value.location) for value in values if isinstance(value.const_value, ir.ExternalTensor)}
    for file in stacks:
        if file.name not in read:
            file.unlink()
