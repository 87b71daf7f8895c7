"""Start of an export in every mode: opens the base and reports every problem before any long work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_merge.errors import UnsupportedError
from adapter_merge.export.engine.providers import check_packages, check_runnable, parse_device
from adapter_merge.export.folder.export_manifest import Manifest, base_license
from adapter_merge.export.graph.adapter_source import factors_of
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.targets import Layout, Target
from adapter_merge.outputs.staging import check_output, check_space
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint

from .decoder import BYTES_PER_WEIGHT, check_decoder, io_dtype


def silent(text: str) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Request:
    """One export, after all checks that do not read an adapter."""

    mode: str
    checkpoint: Checkpoint
    adapters: Mapping[str, Path]
    output: Path
    precision: str
    device: str  # "cpu" or "cuda"
    overwrite: bool
    dry_run: bool
    force: bool = False  # use adapters where evidence contradicts the base
    check: bool = True  # compare the export with the live model before it is published
    say: Callable[[str], None] = silent
    started: float = field(default_factory=time.perf_counter)

    def factors(self) -> dict[str, Factors]:
        """Return the factors of every adapter on the base."""
        return {name: factors_of(self.checkpoint.folder, source, self.force) for name, source in self.adapters.items()}

    def reserve(self, nbytes: int) -> int:
        """Return `nbytes` if the output's disk has that much space. Raises OutputError otherwise."""
        check_space(self.output, nbytes)
        return nbytes

    def plan(self, adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the first keys of the report."""
        return {
            "mode": self.mode,
            "base": str(self.checkpoint.folder),
            "precision": self.precision,
            "device": self.device,
            "adapters": dict(adapters),
        }

    def manifest(self, kind: str = "decoder", **options: Any) -> Manifest:
        """Return the manifest of this export, without adapters."""
        checkpoint = self.checkpoint
        return Manifest(
            kind, self.mode, self.precision, self.device, checkpoint.folder, checkpoint.fingerprint,
            options=options, license=base_license(checkpoint.folder),
        )  # fmt: skip

    def layout(self, targets: tuple[Target, ...] = (), heads: Mapping[str, str] | None = None) -> Layout:
        """Return the layout of this export's graph, with these targets and heads."""
        dtype = io_dtype(self.precision, self.device)
        return Layout(self.mode, self.checkpoint.fingerprint, self.precision, dtype, targets, dict(heads or {}))

    def done(self, manifest: Manifest) -> dict[str, Any]:
        """Return the last keys of the report."""
        return {
            "parity": dict(manifest.parity),
            "output": str(self.output),
            "seconds": round(time.perf_counter() - self.started, 2),
        }


def open_request(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    mode: str,
    precision: str = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    force: bool = False,
    check: bool = True,
    say: Callable[[str], None] = silent,
    traced: bool = False,
) -> Request:
    """Open `base` and check packages, device, architecture (of the model builder, unless `traced`) and output.

    Raises InputError, UnsupportedError, OutputError or MissingDependencyError.
    """
    check_packages("onnxscript" if traced else "onnxruntime_genai", "onnx_ir", "transformers")
    kind, _ = parse_device(device)
    checkpoint = open_base(base)
    if checkpoint.stored is not None and not (mode == "merged" and adapters):
        raise UnsupportedError(
            f"{checkpoint.folder}: is quantised, and an export reads the weights of its base as they are stored",
            expected="--mode merged with adapters, which merges into the dequantised weights first",
            hint="export the output of `adapter-merge merge QBASE ADAPTER --as float32`",
        )
    if not traced:
        check_decoder(checkpoint.config, checkpoint.folder, precision, kind)
    if check and not dry_run:
        check_runnable(precision)
    check_output(output, overwrite, (checkpoint.folder, *adapters.values()))
    return Request(mode, checkpoint, adapters, output, precision, kind, overwrite, dry_run, force, check, say)


def export_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Return an upper bound of the disk space of an export in bytes: every weight once in its precision, and 64 MB."""
    elements = sum(math.prod(ref.shape) for ref in checkpoint.tensors.values())
    if not checkpoint.config.get("tie_word_embeddings", False) and precision == "int4":
        return int(elements * 2) + 2**26  # embeddings stay in floating point
    return int(elements * BYTES_PER_WEIGHT.get(precision, 4.0) * 1.1) + 2**26


def figures(factors: Factors) -> dict[str, Any]:
    """Describe an adapter for reports: linears, ranks, row scales."""
    return {
        "source": str(factors.source),
        "method": factors.method,
        "relative_error": factors.error,
        **factors.evidence(),
        "linears": len(factors.linears),
        "max_rank": factors.max_rank,
        "row_scaled": sum(linear.row_scale is not None for linear in factors.linears.values()),
        "replaced": len(factors.replacements),
    }
