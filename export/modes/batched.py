"""Several adapters in one batch: each sequence names its adapter by number, and the graph gathers its factors.

The factors of all adapters lie in one stack per target (slot 0 is zeros: the base), the input adapter_ids
(batch,) picks a slot for every sequence. All slots of a target are as wide as its largest rank, so a batch of
one is slower than in a switchable export: a mode of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import InputError
from adapter_merge.export.building.checks_before_build import Request
from adapter_merge.export.building.decoder import build_decoder
from adapter_merge.export.checking.parity import check_decoder_parity
from adapter_merge.export.engine.decoder_settings import hide_from_genai
from adapter_merge.export.folder.atomic_change import hidden
from adapter_merge.export.folder.contents import save_graph, write_manifest
from adapter_merge.export.graph.adapter_file import packed
from adapter_merge.export.graph.adapter_ids import insert_stacks, remove_stacks
from adapter_merge.export.graph.decoder_inputs import prepare_graph
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.targets import Layout, Target
from adapter_merge.outputs.staging import staged

from .decoder_with_adapters import adapted_layout, begin

if TYPE_CHECKING:
    import onnx_ir as ir

DATA = "adapters.onnx.data"
ALIGNMENT = 4096
Values = tuple[Any, Any, Any]  # A (k, R), B (R, n), s (n,) or None: one adapter on one target


def export_batched(base: str | Path, adapters: Mapping[str, Path], output: Path, **options: Any) -> dict[str, Any]:
    """Write an export of `base` that applies one adapter per sequence of a batch; return the report.

    Options: see request.open_request. Raises InputError, MismatchError, UnsupportedError, OutputError or
    MissingDependencyError before the build.
    """
    if not adapters:
        raise InputError("a batched export without adapters", expected="at least one NAME=ADAPTER")
    request, factors, plan = begin(base, adapters, output, "batched", options)
    if request.dry_run:
        return plan
    with staged(output, request.overwrite, request.checkpoint.snapshot) as staging:
        build_decoder(request.checkpoint.folder, staging, request.precision, request.device)
        import onnx_ir as ir

        model = ir.load(staging / "model.onnx")
        prepare_graph(model, hide_from_genai(staging), whole_cache=True)
        layout = replace(adapted_layout(model, request, factors), adapters=tuple(factors))
        slots = {
            target.name: [packed(target, value.linears) for value in factors.values()] for target in layout.targets
        }
        count = write_stacks(model, layout, slots, staging / DATA, staging / "model.onnx")
        manifest = request.manifest()
        manifest.adapters |= batched_entries(request, factors, DATA)
        check_decoder_parity(request, staging, manifest)
        write_manifest(staging, manifest)
    return {**plan, "targets": count, **request.done(manifest)}


def batched_entries(request: Request, factors: Mapping[str, Factors], file: str | None) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries: source, number, and the file of the stacks where they are not in the graph's."""
    return {
        name: {
            "source": str(request.adapters[name]),
            **({"file": file} if file else {}),
            "id": slot,
            **value.evidence(),
        }
        for slot, (name, value) in enumerate(factors.items(), start=1)
    }


def restack(
    folder: Path, layout: Layout, factors: Mapping[str, Factors], sources: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """Write the stacks in `folder` again with `factors` in new slots; return the manifest's new entries.

    The stacks get a new file, and the graph that names it the hidden name that pending.commit replaces.
    """
    import onnx_ir as ir

    model = ir.load(folder / "model.onnx")
    old = {target.name: _slots(model.graph, target, len(layout.adapters)) for target in layout.targets}
    names = [*layout.adapters, *(name for name in factors if name not in layout.adapters)]
    slots = {
        target.name: [
            packed(target, factors[name].linears) if name in factors else old[target.name][index]
            for index, name in enumerate(names)
        ]
        for target in layout.targets
    }
    remove_stacks(model, layout)
    before = {path.name for path in folder.glob("adapters*.onnx.data")}
    number = 1 + max(
        (int(match[1]) for name in before if (match := re.fullmatch(r"adapters\.(\d+)\..*", name))), default=0
    )
    file = folder / f"adapters.{number}.onnx.data"
    graph = hidden(folder / "model.onnx")
    write_stacks(model, replace(layout, adapters=tuple(names)), slots, file, graph)
    return {
        name: {**({"source": str(sources[name])} if name in sources else {}), "file": file.name, "id": slot}
        for slot, name in enumerate(names, start=1)
    }


def write_stacks(
    model: ir.Model, layout: Layout, slots: Mapping[str, Sequence[Values | None]], file: Path, graph: Path
) -> int:
    """Insert the stacks, write them to `file` and the graph to `graph`; return the number of targets with a stack."""
    stacks = {target.name: stack(target, slots[target.name]) for target in layout.targets}
    present = {name: value for name, value in stacks.items() if value is not None}
    insert_stacks(model, layout, present)
    move_out(model, file)
    save_graph(model, graph)
    return len(present)


def _slots(graph: ir.Graph, target: Target, count: int) -> list[Values | None]:
    """Return the stacks' content of `target` for each of `count` adapters, float32."""
    import numpy as np

    arrays = []
    for name in (target.down_name, target.up_name, target.scale_name):
        value = graph.initializers.get(name)
        array = value.const_value.numpy() if value is not None and value.const_value is not None else None
        arrays.append(None if array is None else np.array(array, np.float32))
    down, up, scale = arrays
    if down is None and scale is None:
        return [None] * count
    if down is None or up is None:
        down, up = np.zeros((1 + count, target.k, 0), np.float32), np.zeros((1 + count, 0, target.n), np.float32)
    return [(down[slot], up[slot], None if scale is None else scale[slot, 0]) for slot in range(1, 1 + count)]


def stack(target: Target, values: Sequence[Values | None]) -> Values | None:
    """Return A (1 + adapters, k, R), B (1 + adapters, R, n) and s (1 + adapters, 1, n), each None where not needed.

    None when no adapter touches the target.
    """
    import numpy as np

    if all(value is None for value in values):
        return None
    rank = max(value[0].shape[1] for value in values if value is not None)
    slots = 1 + len(values)
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
    """Write the in-memory initialisers to `file`, and refer to it from the graph."""
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
