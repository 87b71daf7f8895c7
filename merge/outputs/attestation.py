"""Statement of an output's inputs as an in-toto statement with SLSA provenance v1, made from the manifest.

Sources: https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1. The statement is not signed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.files.hashing import file_sha256

from .integrity import adapter_entries, check_integrity
from .manifest import MANIFEST, read_manifest
from .unlisted_files import stated_hashes

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:adapter-merge:output:v1"
BUILDER = "urn:adapter-merge:command-line"


def attest(folder: str | Path) -> dict[str, Any]:
    """Return the statement of `folder`, after comparing the hash of every file with the manifest.

    Subjects are the output's files and its manifest, dependencies the files of base and adapters, each with its
    sha256. Raises what check_integrity raises.
    """
    folder = Path(folder)
    check_integrity(folder)
    manifest = read_manifest(folder) or {}
    files = {**stated_hashes(folder, manifest["files"]), MANIFEST: file_sha256(folder / MANIFEST)}
    versions = dict(manifest["versions"])
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha}} for name, sha in sorted(files.items())],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "artefact": manifest["artefact"],
                    "base": (manifest.get("base") or {}).get("name"),
                    "adapters": [
                        {key: entry[key] for key in ("name", "method", "format", "base_kind", "stated") if key in entry}
                        for entry in adapter_entries(manifest)
                    ],
                    "options": manifest["options"],
                },
                "internalParameters": {"versions": versions},
                "resolvedDependencies": list(_dependencies(manifest)),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": versions},
                "metadata": {"finishedOn": manifest["created"]},
            },
        },
    }


def _dependencies(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a resource descriptor of every input file whose hash was recorded."""
    base = manifest.get("base") or {}
    for kind, source in (("base", base), *(("adapter", entry) for entry in adapter_entries(manifest))):
        for name, sha in sorted((source.get("files") or {}).items()):
            yield {"name": f"{kind}/{source.get('name')}/{name}", "digest": {"sha256": sha}}
