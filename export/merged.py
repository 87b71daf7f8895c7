"""A model with one adapter merged into it (or with none): nothing can be switched, nothing costs anything.

The adapter is merged before the builder sees the weights, in float32 arithmetic with one rounding, so an int4
export quantises the merged weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.merge.checkpoint import open_checkpoint
from adapter_merge.merge.errors import InputError
from adapter_merge.merge.output import check_output, check_space, staged

from .decoder import build_decoder, check_decoder, io_dtype
from .folder import Manifest, write_manifest
from .insertion import stamp
from .runtime import check_packages, parse_device
from .switchable import export_bytes, save_graph
from .targets import Layout

DTYPES = {"fp32": "float32", "int4": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_merged(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the export of `base` with at most one adapter merged into it to `output`; figures of what was done.

    Disk: the merged checkpoint lies beside the output while the builder reads it. Raises InputError,
    MismatchError, UnsupportedError, OutputError or MissingDependencyError before the build.
    """
    started = time.perf_counter()
    check_packages("onnxruntime_genai", "onnx_ir", "transformers")
    kind, _ = parse_device(device)
    checkpoint = open_checkpoint(base)
    check_decoder(checkpoint.config, checkpoint.folder, precision, kind)
    check_single(adapters)
    check_output(output, overwrite, (checkpoint.folder, *adapters.values()))
    need = export_bytes(checkpoint, precision) + (export_bytes(checkpoint, "fp32") if adapters else 0)
    check_space(output, need)
    plan: dict[str, Any] = {
        "mode": "merged",
        "base": str(checkpoint.folder),
        "precision": precision,
        "device": kind,
        "adapters": {name: {"source": str(source)} for name, source in adapters.items()},
    }
    from adapter_merge.merge.merging import merge

    if dry_run:
        for source in adapters.values():
            merge(checkpoint.folder, source, output.with_name(f".{output.name}.merged"), dry_run=True, device="cpu")
        return {**plan, "dry_run": True, "bytes_needed": need}
    with staged(output, overwrite) as staging:
        weights = checkpoint.folder
        manifest = Manifest("decoder", "merged", precision, kind, checkpoint.folder, checkpoint.fingerprint)
        for name, source in adapters.items():
            weights = staging / "merged"
            content = merge(checkpoint.folder, source, weights, dtype=DTYPES[precision], device="cpu")
            entry = content["adapters"][0]
            manifest.adapters[name] = {"source": str(source), "method": entry["method"], "sha256": entry["sha256"]}
        merged_at = time.perf_counter()
        build_decoder(weights, staging, precision, kind)
        if adapters:
            _remove(staging / "merged")
        import onnx_ir as ir

        model = ir.load(staging / "model.onnx")
        dtype = io_dtype(precision, kind)
        stamp(model, Layout("merged", checkpoint.fingerprint, precision, dtype, (), {}, tuple(adapters)))
        for name, entry in manifest.adapters.items():
            model.metadata_props[f"adapter_merge.adapter.{name}"] = entry["sha256"]
        save_graph(model, staging / "model.onnx")
        write_manifest(staging, manifest)
    return {
        **plan,
        "output": str(output),
        "merge_seconds": round(merged_at - started, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }


def check_single(adapters: Mapping[str, Path]) -> None:
    """Raise InputError unless there is at most one adapter."""
    if len(adapters) > 1:
        raise InputError(
            "a merged export holds one adapter",
            expected="at most one NAME=ADAPTER",
            got=", ".join(adapters),
            hint="--mode switchable or --mode batched holds many; adapter-merge merge, twice, puts one upon the other",
        )


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
