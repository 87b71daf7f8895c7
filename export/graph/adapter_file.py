"""NAME.onnx_adapter: one adapter's tensors in ONNX Runtime's adapter format, for one export.

A packed target (q, k, v) has one A with the columns of all parts and one block-diagonal B, so that one product replaces
three; the zeros of B change no value. The file contains only the targets that the adapter changes. For all others the
graph uses its default inputs (rank 0, scale 1), which compute the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.binding.positional import QUERY
from adapter_merge.errors import FileFormatError, MismatchError, OutputError, Problem, raise_all

from .branching import ACTIVE
from .factor_folder import Factors, LinearFactors
from .targets import POSITIONS, Layout, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIX = ".onnx_adapter"
FORMAT_LIMIT = 2**31 - 2**20  # bytes; flatbuffers writes a larger file without an error, but cannot load it


def match_factors(factors: Factors, layout: Layout) -> None:
    """Raise MismatchError, with every problem, when `factors` do not fit the export."""
    factors = aligned(factors, layout)
    problems = []
    places = {part.module: (target, part) for target in layout.targets for part in target.parts}
    problems.extend(_shared_queries(factors, layout))
    for module, linear in factors.linears.items():
        if module not in places:
            problems.append(
                Problem(
                    f"{factors.source}: this export has no inputs for an adapter of {module}",
                    hint="export again with this adapter named on the command line, or merge it",
                )
            )
            continue
        target, part = places[module]
        shape = (part.size, target.k)
        got_shape = (linear.up.shape[0], linear.down.shape[1])
        if shape != got_shape:
            problems.append(Problem(f"{factors.source}: {module} has another shape", str(shape), str(got_shape)))
    problems.extend(
        Problem(
            f"{factors.source}: replaces {name}, which this export cannot switch",
            expected=", ".join(layout.heads) or "low-rank factors and row scales only",
            hint="export with --mode merged",
        )
        for name in factors.replacements
        if name not in layout.heads
    )
    raise_all(problems, MismatchError)


def _shared_queries(factors: Factors, layout: Layout) -> list[Problem]:
    """Return the problems of a DeBERTa adapter whose positional queries are not stated or not supported."""
    positions = {part.module for target in layout.targets for part in target.parts if part.module.endswith(POSITIONS)}
    shared_targets = {target.name for target in layout.targets if len(target.nodes) > 1}
    adapted = [name for name in factors.linears if f".{name}".endswith(f".{QUERY}")]
    if factors.frozen_positions:
        return [
            Problem(
                f"{factors.source}: adapts {name} for tokens only, and this export adapts it for positions too",
                hint="export again: this version separates the two",
            )
            for name in adapted
            if name in shared_targets
        ]
    return [
        Problem(
            f"{factors.source}: factors of a DCFT that do not state whether they apply to positional queries",
            hint="export the DCFT itself: these factors were made by an older version",
        )
        for name in adapted
        if factors.method == "DCFT" and name + POSITIONS in positions
    ][:1]


def match_all(factors: Mapping[str, Factors], layout: Layout) -> None:
    """Raise MismatchError, with every problem of every adapter, when they do not fit the export."""
    problems: list[Problem] = []
    for value in factors.values():
        try:
            match_factors(value, layout)
        except MismatchError as error:
            problems.extend(error.problems)
    raise_all(problems, MismatchError)


def aligned(factors: Factors, layout: Layout) -> Factors:
    """Return the factors under the names of the export's modules and tensors."""
    return factors.rename_for((part.module for target in layout.targets for part in target.parts), layout.heads)


def packed(target: Target, linears: Mapping[str, LinearFactors]) -> tuple[Any, Any, Any] | None:
    """Return A (k, R), B (R, n) and s (n,) (or None) of one target in float32; None when no part of it is adapted."""
    import numpy as np

    present = [(part, linears[part.module]) for part in target.parts if part.module in linears]
    if not present:
        return None
    rank = sum(linear.rank for _, linear in present)
    down: NDArray[np.float32] = np.zeros((target.k, rank), np.float32)
    up: NDArray[np.float32] = np.zeros((rank, target.n), np.float32)
    scale: NDArray[np.float32] | None = None
    row = 0
    for part, linear in present:
        down[:, row : row + linear.rank] = linear.down.T
        up[row : row + linear.rank, part.start : part.start + part.size] = linear.up.T
        row += linear.rank
        if linear.row_scale is not None:
            if scale is None:
                scale = np.ones((target.n,), np.float32)
            scale[part.start : part.start + part.size] = linear.row_scale
    return down, up, scale


def adapter_tensors(factors: Factors, layout: Layout) -> dict[str, Any]:
    """Return graph input -> float32 array for every input that differs from its default. Raises MismatchError."""
    import numpy as np

    match_factors(factors, layout)
    factors = aligned(factors, layout)
    tensors: dict[str, Any] = {}
    if layout.branched:
        tensors[ACTIVE] = np.ones(1, np.float32)
    for target in layout.targets:
        values = packed(target, factors.linears)
        if values is None:
            continue
        down, up, scale = values
        if down.shape[1]:
            tensors[target.down_name] = down
            tensors[target.up_name] = up
        if scale is not None:
            tensors[target.scale_name] = scale
    for name, value in factors.replacements.items():
        tensors[layout.heads[name]] = value
    return tensors


def write_adapter(factors: Factors, layout: Layout, file: Path) -> int:
    """Write `factors` for the export with `layout` to `file`, atomically; return its size in bytes.

    Raises MismatchError, or OutputError for an adapter that is too large for ONNX Runtime's format.
    """
    import onnxruntime

    tensors = adapter_tensors(factors, layout)
    item = 4 if layout.dtype == "float32" else 2
    size = sum(tensor.size for tensor in tensors.values()) * item
    if size > FORMAT_LIMIT:
        raise OutputError(
            f"{file.name}: ONNX Runtime's adapter format is limited to 2 GiB",
            got=f"{size:,} bytes",
            hint="export this adapter with --mode merged, or with --precision fp16",
        )
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(layout.version)
    # AdapterFormat keeps pointers to these values, which must therefore live until export_adapter returns.
    values = {name: ort_value(tensor, layout.dtype) for name, tensor in tensors.items()}
    content.set_parameters(values)
    temporary = file.with_name(f".{file.name}.new")
    try:
        content.export_adapter(str(temporary.resolve()))
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    del values
    return file.stat().st_size


def ort_value(array: Any, dtype: str) -> Any:
    """Return an onnxruntime.OrtValue of a float32 array in the graph's dtype, rounded once."""
    import numpy as np
    import onnxruntime

    if dtype == "bfloat16":
        import ml_dtypes

        bits = np.ascontiguousarray(array).astype(ml_dtypes.bfloat16).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype=dtype))


def check_adapter(file: Path, layout: Layout) -> Any:
    """Read the onnxruntime.AdapterFormat in `file`. Raises FileFormatError or MismatchError."""
    import onnxruntime

    if not file.is_file():
        raise FileFormatError(f"{file}: no such adapter file")
    try:
        content = onnxruntime.AdapterFormat.read_adapter(str(file.resolve()))
    except Exception as error:  # pybind exceptions
        raise FileFormatError(f"{file}: not an ONNX Runtime adapter", got=str(error).split("\n")[0]) from error
    if content.get_model_version() != layout.version:
        raise MismatchError(
            f"{file.name}: written for another export",
            expected=f"model version {layout.version} (base {layout.base[:16]})",
            got=f"model version {content.get_model_version()}",
            hint="adapter-merge export --add NAME=ADAPTER FOLDER writes one for this export",
        )
    return content


def load_tensors(file: Path, layout: Layout) -> dict[str, Any]:
    """Return graph input -> OrtValue of the adapter in `file`, after checking that it belongs to this export."""
    values: dict[str, Any] = check_adapter(file, layout).get_parameters()
    return values
