"""Description of a merged model, deltas or an ONNX export of this project, for `adapter-merge inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterMergeError
from adapter_merge.outputs.leftovers import PREIMAGE_FOLDER
from adapter_merge.outputs.manifest import MANIFEST, read_manifest
from adapter_merge.storage.checkpoint import resolve

ADAPTERS = ("adapter", "factors")  # artefacts that are described as adapters
COMMANDS = {  # artefact -> command -> what it does with the artefact
    "merged model": {
        "verify": "adapter-merge verify {path}: unchanged since written; --trained: computes what was trained",
        "restore": "adapter-merge restore {path} -o BASE: the base again, {restore}",
    },
    "deltas": {"verify": "adapter-merge verify {path}: unchanged since written; --trained: the deltas of the adapter"},
    "ONNX model": {
        "verify": "adapter-merge verify {path}: unchanged since written",
        "generate": "adapter-merge generate {path} --prompt TEXT",
    },
}


def inspect_artefact(name: str | Path) -> dict[str, Any] | None:
    """Describe the artefact in `name` from its manifest; None where it is not such an artefact. No weight is read."""
    try:
        folder = resolve(name) if not Path(name).is_file() else None
        manifest = read_manifest(folder) if folder is not None else None
    except AdapterMergeError:
        return None  # the reader of adapters reports the problem
    if folder is None or manifest is None or manifest["artefact"] in ADAPTERS:
        return None
    files = [path for path in folder.rglob("*") if path.is_file()]
    preimage = sum(path.stat().st_size for path in files if PREIMAGE_FOLDER in path.relative_to(folder).parts[:1])
    restored = "from its pre-image" if preimage else "from --base"
    would = COMMANDS.get(manifest["artefact"], {})
    return {
        "path": str(name),
        "artefact": manifest["artefact"],
        "created": manifest.get("created"),
        "versions": manifest.get("versions", {}),
        "base": {key: manifest.get("base", {}).get(key) for key in ("name", "path", "fingerprint")},
        "adapters": [describe_adapter(entry) for entry in adapters_of(manifest)],
        "options": manifest.get("options", {}),
        "weights": len(manifest.get("layers", {})),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files) - preimage,
        "preimage_bytes": preimage,
        "warnings": list(manifest.get("warnings", ())),
        "would": {command: text.format(path=name, restore=restored) for command, text in would.items()},
        "problems": [
            {"cause": f"{folder / file}: is listed in {MANIFEST}, but missing", "expected": None, "got": None,
             "hint": "the folder is incomplete: copy it again"}
            for file in manifest.get("files", {})
            if not (folder / file).exists()
        ],
    }  # fmt: skip


def adapters_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifest's adapters with their names and paths; an ONNX export stores them as a mapping by name."""
    adapters = manifest.get("adapters") or []
    if not isinstance(adapters, Mapping):
        return list(adapters)
    return [{"name": name, "path": entry.get("source"), **entry} for name, entry in adapters.items()]


def describe_adapter(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an adapter in a manifest that `inspect` shows."""
    return {key: entry.get(key) for key in ("name", "path", "method", "modules", "origin")}
