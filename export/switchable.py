"""One graph, one weights file, one small file per adapter: export, and adding adapters later.

What is exact: fp32 exports compute the adapter as trained. Over an int4 base the factors and scales stay in
floating point and are added to the quantised product, which is not the same as merging and then quantising.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.merge.checkpoint import Checkpoint, open_checkpoint
from adapter_merge.merge.errors import InputError, MismatchError, OutputError, Problem, raise_all
from adapter_merge.merge.output import check_output, check_space, staged

from .adapter_file import SUFFIX, match_factors, write_adapter
from .adapter_source import factors_of
from .decoder import BYTES_PER_WEIGHT, build_decoder, check_decoder, io_dtype
from .factor_folder import Factors
from .folder import Manifest, read_export, write_manifest
from .insertion import insert_switches
from .runtime import check_external_data, check_packages, parse_device
from .targets import Layout, Target, decoder_targets, read_layout

if TYPE_CHECKING:
    import onnx_ir as ir


def export_switchable(
    base: str | Path,
    adapters: Mapping[str, Path],
    output: Path,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the switchable export of `base` with `adapters` to `output`; figures of what was done.

    Raises InputError, MismatchError, UnsupportedError, OutputError, MissingDependencyError before the build.
    """
    started = time.perf_counter()
    check_packages("onnxruntime_genai", "onnx_ir", "transformers")
    kind, _ = parse_device(device)
    checkpoint = open_checkpoint(base)
    check_decoder(checkpoint.config, checkpoint.folder, precision, kind)
    check_output(output, overwrite, (checkpoint.folder, *adapters.values()))
    check_space(output, export_bytes(checkpoint, precision))
    factors = {name: factors_of(checkpoint.folder, source) for name, source in adapters.items()}
    check_modules(factors, checkpoint)
    plan: dict[str, Any] = {
        "mode": "switchable",
        "base": str(checkpoint.folder),
        "precision": precision,
        "device": kind,
        "adapters": {name: figures(value) for name, value in factors.items()},
    }
    if dry_run:
        return {**plan, "dry_run": True, "bytes_needed": export_bytes(checkpoint, precision)}
    with staged(output, overwrite) as staging:
        build_decoder(checkpoint.folder, staging, precision, kind)
        built = time.perf_counter()
        import onnx_ir as ir

        model = ir.load(staging / "model.onnx")
        layout = switchable_layout(model, checkpoint, factors, precision, kind)
        insert_switches(model, layout)
        save_graph(model, staging / "model.onnx")
        sizes = {name: write_adapter(value, layout, staging / f"{name}{SUFFIX}") for name, value in factors.items()}
        manifest = Manifest("decoder", "switchable", precision, kind, checkpoint.folder, checkpoint.fingerprint)
        for name in factors:
            manifest.adapters[name] = {
                "source": str(adapters[name]),
                "file": f"{name}{SUFFIX}",
                "bytes": sizes[name],
            }
        write_manifest(staging, manifest)
    return {
        **plan,
        "output": str(output),
        "targets": len(layout.targets),
        "adapter_bytes": sizes,
        "build_seconds": round(built - started, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }


def add_adapters(
    folder: Path, adapters: Mapping[str, Path], *, base: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Add adapters to an existing switchable export: only small files are written, the graph stays.

    The base is needed where an adapter is not in factor form yet (DuDe and DoRA read the rows they scale):
    the folder that the export was made from, or `base`. Raises MismatchError when that is another base.
    """
    started = time.perf_counter()
    check_packages("onnx_ir")
    layout = folder_layout(folder)
    if layout.mode != "switchable":
        raise InputError(
            f"{folder}: a {layout.mode} export takes no more adapters here",
            expected="an export made with --mode switchable",
            hint="for --mode batched, export again with all the adapters" if layout.mode == "batched" else None,
        )
    manifest = read_export(folder)
    taken = [name for name in adapters if (folder / f"{name}{SUFFIX}").exists()]
    if taken and not overwrite:
        raise OutputError(f"{folder} has adapters of these names: {', '.join(taken)}", hint="--overwrite")
    checkpoint_folder = base_of(folder, manifest, layout, base)
    factors = {name: factors_of(checkpoint_folder, source) for name, source in adapters.items()}
    problems: list[Problem] = []
    for value in factors.values():
        try:
            match_factors(value, layout)
        except MismatchError as error:
            problems.extend(error.problems)
    raise_all(problems, MismatchError)
    sizes = {}
    for name, value in factors.items():
        file = folder / f"{name}{SUFFIX}"
        sizes[name] = write_adapter(value, layout, file)
        manifest.adapters[name] = {"source": str(adapters[name]), "file": file.name, "bytes": sizes[name]}
    write_manifest(folder, manifest)
    return {
        "mode": "switchable",
        "output": str(folder),
        "adapters": {name: figures(value) for name, value in factors.items()},
        "adapter_bytes": sizes,
        "seconds": round(time.perf_counter() - started, 2),
    }


def base_of(folder: Path, manifest: Manifest, layout: Layout, base: str | Path | None) -> Path:
    """The base checkpoint of an export, checked by its fingerprint. Raises InputError or MismatchError."""
    source = Path(manifest.base) if base is None else base
    try:
        checkpoint = open_checkpoint(source)
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


def switchable_layout(
    model: ir.Model, checkpoint: Checkpoint, factors: Mapping[str, Factors], precision: str, device: str
) -> Layout:
    """All linears of the layers are targets; lm_head only when one of the adapters names it (it is wide)."""
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    head = any("lm_head" in value.linears for value in factors.values())
    targets = decoder_targets([node.name or "" for node in model.graph], shapes, head=head)
    check_products(model, targets)
    dtype = io_dtype(precision, device)
    # CUDA graphs know no If
    return Layout("switchable", checkpoint.fingerprint, precision, dtype, targets, {}, branched=device == "cpu")


def check_products(model: ir.Model, targets: tuple[Target, ...]) -> None:
    """Raise MismatchError unless every target's product has the shape that the checkpoint's linears have."""
    nodes = {node.name or "": node for node in model.graph}
    problems = []
    for target in targets:
        for name in target.nodes:
            node = nodes[name]
            if node.op_type == "MatMul":
                value = node.inputs[1]
                shape = tuple(value.shape) if value is not None and value.shape is not None else None
            else:
                shape = (node.attributes["K"].as_int(), node.attributes["N"].as_int())
            if shape != (target.k, target.n):
                problems.append(
                    Problem(f"{name}: the builder's product differs", str((target.k, target.n)), str(shape))
                )
    raise_all(problems, MismatchError)


LINEAR = re.compile(r"(model\.layers\.\d+\.(self_attn|mlp)\.\w+|lm_head)")


def check_modules(factors: Mapping[str, Factors], checkpoint: Checkpoint) -> None:
    """Raise MismatchError before the build when an adapter cannot be switched on this base."""
    problems = []
    for value in factors.values():
        if value.base is not None and value.base != checkpoint.fingerprint:
            problems.append(Problem(f"{value.source}: made for another base than {checkpoint.folder}"))
        for module, linear in value.linears.items():
            ref = checkpoint.tensors.get(f"{module}.weight")
            if ref is None and module == "lm_head":
                ref = checkpoint.tensors.get("model.embed_tokens.weight")
            got = (linear.up.shape[0], linear.down.shape[1])
            if ref is None or not LINEAR.fullmatch(module):
                problems.append(
                    Problem(
                        f"{value.source}: {module} cannot be switched in a graph",
                        expected="a linear of a layer's self_attn or mlp, or lm_head",
                        hint="export with --mode merged",
                    )
                )
            elif ref.shape != got:
                problems.append(Problem(f"{value.source}: {module} has another shape", str(ref.shape), str(got)))
        problems.extend(
            Problem(
                f"{value.source}: replaces {name} as a whole, which a decoder's graph cannot switch",
                hint="export with --mode merged",
            )
            for name in value.replacements
        )
    raise_all(problems, MismatchError)


def export_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Disk that an export needs, generously: every weight once in its precision, and 64 MB."""
    elements = sum(_elements(ref.shape) for ref in checkpoint.tensors.values())
    if not checkpoint.config.get("tie_word_embeddings", False) and precision == "int4":
        return int(elements * 2) + 2**26  # embeddings stay in floating point
    return int(elements * BYTES_PER_WEIGHT.get(precision, 4.0) * 1.1) + 2**26


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def figures(factors: Factors) -> dict[str, Any]:
    """What an adapter is, for reports: linears, ranks, row scales."""
    return {
        "source": str(factors.source),
        "method": factors.method,
        "relative_error": factors.error,
        "linears": len(factors.linears),
        "max_rank": factors.max_rank,
        "row_scaled": sum(linear.row_scale is not None for linear in factors.linears.values()),
        "replaced": len(factors.replacements),
    }


def save_graph(model: ir.Model, file: Path) -> None:
    """Write the graph alone, in one step; its weights file stays as it is."""
    import onnx_ir as ir

    temporary = file.with_name(f".{file.name}.new")
    try:
        ir.save(model, temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def folder_layout(folder: Path) -> Layout:
    """The layout of the export in `folder`, from the graph alone. Raises InputError or FileFormatError."""
    file = folder / "model.onnx"
    check_external_data(file)
    import onnx_ir as ir

    return read_layout(ir.load(file).metadata_props, str(file))
