"""adapter_merge.json and README.md of an export: inputs, options and versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import FileFormatError, InputError, MismatchError, Problem, raise_all
from adapter_merge.export.engine.providers import PACKAGES, check_external_data, graph_file, installed_packages
from adapter_merge.export.graph.targets import Layout, read_layout
from adapter_merge.files.hashing import file_sha256
from adapter_merge.outputs.manifest import MANIFEST, make_manifest, read_manifest
from adapter_merge.outputs.manifest_seal import sealed
from adapter_merge.outputs.staging import write_json, write_text
from adapter_merge.outputs.unlisted_files import SIGNATURE

from .card import export_card
from .export_manifest import Manifest

if TYPE_CHECKING:
    import onnx_ir as ir

ARTEFACT = "ONNX model"
FORMAT_VERSION = 1
RECORDED = (*PACKAGES, "onnxruntime-genai", "onnxruntime-genai-cuda", "onnx_ir", "onnxscript", "transformers")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the model card, and adapter_merge.json with the size and sha256 of every other file, into `folder`.

    Weights that an earlier manifest hashed and that have not changed in size or time are not read again:
    adding an adapter must not read the base.
    """
    file = folder / MANIFEST
    before: dict[str, Any] = {}
    if file.is_file():
        before = (read_manifest(folder) or {}).get("files", {})
    text = export_card(manifest, folder_layout(folder), folder)
    _replace(folder / "README.md", lambda path: write_text(path, text))
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.startswith(".") or name in (file.name, SIGNATURE):
            continue
        stat = path.stat()
        entry = {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        old = before.get(name, {})
        same = all(old.get(key) == entry[key] for key in entry)
        files[name] = {**entry, "sha256": old["sha256"] if same else file_sha256(path)}
    content = make_manifest(
        ARTEFACT,
        {
            "base": {
                "name": manifest.base_name,
                "path": str(manifest.base),
                "fingerprint": manifest.fingerprint,
                **manifest.license,
            }
        },
        {"mode": manifest.mode, "precision": manifest.precision, "device": manifest.device, **manifest.options},
        format_version=FORMAT_VERSION,
        kind=manifest.kind,
        adapters=manifest.adapters,
        parity=manifest.parity,
        files=files,
    )
    content["versions"] |= installed_packages(RECORDED)
    _replace(file, lambda path: write_json(path, sealed(content)))


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Replace `file` atomically by a new one."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    write(temporary)
    temporary.replace(file)


def read_export(folder: Path) -> Manifest:
    """Read the manifest of the export in `folder`. Raises InputError or FileFormatError when there is none."""
    content = read_manifest(folder)
    if content is None:
        raise InputError(f"{folder}: not an export of adapter-merge", expected=f"{MANIFEST} in it")
    try:
        if content["artefact"] != ARTEFACT or content["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{folder}: not an ONNX export", expected=f"{ARTEFACT}, version {FORMAT_VERSION}",
                got=f"{content['artefact']}, version {content.get('format_version')}",
            )  # fmt: skip
        options = dict(content["options"])
        return Manifest(
            content["kind"],
            options.pop("mode"),
            options.pop("precision"),
            options.pop("device"),
            Path(content["base"]["path"]),
            content["base"]["fingerprint"],
            dict(content["adapters"]),
            options,
            dict(content.get("parity", {})),
            {key: value for key, value in content["base"].items() if key.startswith("license")},
        )
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / MANIFEST}: incomplete ({error} is missing)") from error


def check_outputs(model: ir.Model, source: Path) -> None:
    """Raise MismatchError unless every output of the graph is made by a node, or is an input or initialiser."""
    graph = model.graph
    known = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    problems = [
        Problem(f"{source.name}: nothing in the graph computes its output {value.name}")
        for value in graph.outputs
        if value.producer() is None and id(value) not in known
    ]
    raise_all(problems, MismatchError)


def save_graph(model: ir.Model, file: Path) -> None:
    """Replace the graph atomically, without its weights file. Raises MismatchError for an output without a source."""
    import onnx_ir as ir

    check_outputs(model, file)

    temporary = file.with_name(f".{file.name}.new")
    try:
        ir.save(model, temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def folder_layout(folder: Path) -> Layout:
    """Read the layout of the export in `folder` from the graph. Raises InputError or FileFormatError."""
    file = graph_file(folder)
    check_external_data(file)
    import onnx_ir as ir

    return read_layout(ir.load(file).metadata_props, str(file))
