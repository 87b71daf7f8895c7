"""Several adapters in one batch: every sequence says which one it wants, and the graph gathers it.

The factors of all adapters lie in one stack per target (slot 0 is zeros: the base), the input adapter_ids
(batch,) picks a slot for every sequence. All slots of a target are as wide as its largest rank, so a batch of
one is slower than in a switchable export: a mode of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.merge.checkpoint import open_checkpoint
from adapter_merge.merge.errors import InputError
from adapter_merge.merge.output import check_output, check_space, staged

from .adapter_file import packed
from .adapter_source import factors_of
from .decoder import build_decoder, check_decoder
from .factor_folder import Factors
from .folder import Manifest, write_manifest
from .insertion import insert_stacks
from .runtime import check_packages, parse_device
from .switchable import check_modules, export_bytes, figures, save_graph, switchable_layout
from .targets import Target

if TYPE_CHECKING:
    import onnx_ir as ir

DATA = "adapters.onnx.data"
ALIGNMENT = 4096


def export_batched(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write an export of `base` that answers every sequence of a batch with its own adapter; figures.

    Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError before the build.
    """
    from dataclasses import replace

    started = time.perf_counter()
    check_packages("onnxruntime_genai", "onnx_ir", "transformers")
    kind, _ = parse_device(device)
    checkpoint = open_checkpoint(base)
    check_decoder(checkpoint.config, checkpoint.folder, precision, kind)
    if not adapters:
        raise InputError("a batched export without adapters", expected="at least one NAME=ADAPTER")
    check_output(output, overwrite, (checkpoint.folder, *adapters.values()))
    check_space(output, export_bytes(checkpoint, precision))
    factors = {name: factors_of(checkpoint.folder, source) for name, source in adapters.items()}
    check_modules(factors, checkpoint)
    plan: dict[str, Any] = {
        "mode": "batched",
        "base": str(checkpoint.folder),
        "precision": precision,
        "device": kind,
        "adapters": {name: figures(value) for name, value in factors.items()},
    }
    if dry_run:
        return {**plan, "dry_run": True, "bytes_needed": export_bytes(checkpoint, precision)}
    with staged(output, overwrite) as staging:
        build_decoder(checkpoint.folder, staging, precision, kind)
        import onnx_ir as ir

        model = ir.load(staging / "model.onnx")
        layout = switchable_layout(model, checkpoint, factors, precision, kind)
        layout = replace(layout, mode="batched", adapters=tuple(factors), branched=False)
        stacks = {target.name: stack(target, list(factors.values())) for target in layout.targets}
        present = {name: value for name, value in stacks.items() if value is not None}
        insert_stacks(model, layout, present)
        move_out(model, staging / DATA)
        save_graph(model, staging / "model.onnx")
        manifest = Manifest("decoder", "batched", precision, kind, checkpoint.folder, checkpoint.fingerprint)
        for slot, name in enumerate(factors, start=1):
            manifest.adapters[name] = {"source": str(adapters[name]), "file": DATA, "id": slot}
        write_manifest(staging, manifest)
    return {
        **plan,
        "output": str(output),
        "targets": len(present),
        "seconds": round(time.perf_counter() - started, 2),
    }


def stack(target: Target, adapters: list[Factors]) -> tuple[Any, Any, Any] | None:
    """A (1 + adapters, k, R), B (1 + adapters, R, n) and s (1 + adapters, 1, n), any of them None where not needed.

    None when no adapter touches the target.
    """
    import numpy as np

    values = [packed(target, factors.linears) for factors in adapters]
    if all(value is None for value in values):
        return None
    rank = max(value[0].shape[1] for value in values if value is not None)
    slots = 1 + len(adapters)
    down = np.zeros((slots, target.k, rank), np.float32)
    up = np.zeros((slots, rank, target.n), np.float32)
    scale = np.ones((slots, 1, target.n), np.float32)
    scaled = False
    for slot, value in enumerate(values, start=1):
        if value is None:
            continue
        width = value[0].shape[1]
        down[slot, :, :width] = value[0]
        up[slot, :width] = value[1]
        if value[2] is not None:
            scale[slot, 0] = value[2]
            scaled = True
    return (down if rank else None, up if rank else None, scale if scaled else None)


def move_out(model: ir.Model, file: Path) -> None:
    """Write the initialisers that are still in memory to `file`, and refer to it from the graph."""
    import onnx_ir as ir

    with file.open("wb") as stream:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < ALIGNMENT:
                continue
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            offset = stream.tell()
            stream.write(tensor.tobytes())
            shape = ir.Shape(tensor.shape.numpy())
            name, folder = value.name or "", str(file.parent)
            value.const_value = ir.ExternalTensor(
                file.name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=folder
            )
