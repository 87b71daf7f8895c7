"""The public functions: each job with its options as one value and its result as a dataclass.

`import adapter_merge as am` offers them as `am.merge`, `am.verify`, ... (see merge/__init__.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from adapter_merge.combine.open_inputs import AdapterInput
from adapter_merge.formats.detection import ReadOptions, open_adapter
from adapter_merge.methods.adapter import Adapter
from adapter_merge.storage.checkpoint import open_checkpoint, resolve

from .options import (
    ConvertOptions,
    DeltaOptions,
    ExtractOptions,
    FactorOptions,
    InspectOptions,
    MergeOptions,
    RestoreOptions,
    VerifyOptions,
)
from .results import (
    ConvertResult,
    DeltaResult,
    ExtractResult,
    FactorResult,
    Inspection,
    MergeResult,
    RestoreResult,
    Verification,
)

Progress = Callable[[int], None]


def _keywords(options: Any) -> dict[str, Any]:
    """The fields of an options dataclass as the jobs' keyword arguments."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    if "reading" in values:
        values["options"] = values.pop("reading")
    return values


def merge(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    options: MergeOptions = MergeOptions(),
    *,
    progress: Progress | None = None,
) -> MergeResult:
    """Write the merged model to `output`: every adapted weight changed exactly, everything else carried over.

    base: model folder or hub id; None when `adapter` is a DCFT reference checkpoint, which holds its base, or a recipe
    that names it. adapter: a folder, file or hub id, or a Recipe of several. progress: called with the bytes just
    written, from any thread.

    W' = diag(row_scale) (W0 + up @ down) diag(col_scale), with W0 (out, in), up (out, R) and down (R, in), is computed
    in float32 (float64 for float64 weights) and rounded once to the output's dtype. Raises AdapterMergeError; nothing
    is left behind then but what `keep_partial` or a part keeps.

    Example:
        >>> result = merge("base", "adapter", "merged", MergeOptions(dtype="bfloat16"))
        >>> max(change.relative_delta for change in result.weights.values()) > 0
        True
    """
    from .merge import merge as run

    return MergeResult(Path(output), run(base, adapter, output, progress=progress, **_keywords(options)))


def delta(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    options: DeltaOptions = DeltaOptions(),
    *,
    progress: Progress | None = None,
) -> DeltaResult:
    """Write dW = W' - W0 of every adapted weight to `output`/delta.safetensors, in the shape that the base stores.

    base, adapter, progress: as for `merge`. Raises AdapterMergeError; nothing is left behind then.

    Example:
        >>> delta("base", "adapter", "deltas").not_included
        ()
    """
    from .merge import delta as run

    return DeltaResult(Path(output), run(base, adapter, output, progress=progress, **_keywords(options)))


def factor(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    options: FactorOptions = FactorOptions(),
    *,
    progress: Progress | None = None,
) -> FactorResult:
    """Write the adapter's low-rank factors to `output` as a PEFT folder: exact, or truncated with a certificate.

    base: needed for DoRA and DuDe (row norms) and for PiSSA without stored initial factors; its weights are read only
    then. progress: called with the bytes of each finished module. up (out, R) and down (R, in) are written in float32
    with a scale of 1. Raises AdapterMergeError (ParityError beyond `max_error`); nothing is left behind then.

    Example:
        >>> factor("base", "adapter", "factors", FactorOptions(rank=2)).certificate.ranks
        (2, 2)
    """
    from .factor import factor as run

    return FactorResult(Path(output), run(base, adapter, output, progress=progress, **_keywords(options)))


def convert(adapter: str | Path, output: str | Path, options: ConvertOptions = ConvertOptions()) -> ConvertResult:
    """Write `adapter` (a folder, file or hub id of any format) to `output` as a safe folder.

    The folder holds safetensors and a config that states everything: it merges to the same bytes and needs no options.
    Raises AdapterMergeError; nothing is left behind then.

    Example:
        >>> convert("adapter", "safe", ConvertOptions(base="base")).artefact
        'adapter'
    """
    from .convert import convert as run

    return ConvertResult(Path(output), run(adapter, output, **_keywords(options)))


def extract(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    options: ExtractOptions = ExtractOptions(),
    *,
    progress: Progress | None = None,
) -> ExtractResult:
    """Write the PEFT folder that turns `base` into `finetuned` (model folders or hub ids) as well as its rank allows.

    Weights (out, in) are compared in float32; the truncated SVD of a difference is the best approximation of its rank
    (Eckart-Young-Mirsky). progress: called with the bytes of each weight. Raises AdapterMergeError.

    Example:
        >>> extract("base", "merged", "extracted", ExtractOptions(rank=0.99)).form
        'lora'
    """
    from .extract import extract as run

    return ExtractResult(Path(output), run(base, finetuned, output, progress=progress, **_keywords(options)))


def restore(
    merged: str | Path,
    output: str | Path,
    options: RestoreOptions = RestoreOptions(),
    *,
    progress: Progress | None = None,
) -> RestoreResult:
    """Write the base of `merged` to `output`, bit for bit, each file proved against the manifest's sha256.

    progress: called with the bytes of each file. Raises InputError without a base and a pre-image, MismatchError when
    the base is another model, FileFormatError when what was restored is not what the manifest promises.

    Example:
        >>> sorted(restore("merged", "base-again", RestoreOptions(base="base")).files)[0]
        'config.json'
    """
    from .restore import restore as run

    return RestoreResult(Path(output), run(merged, output, progress=progress, **_keywords(options)))


def verify(
    base: str | Path | None,
    adapter: AdapterInput,
    artefact: str | Path,
    options: VerifyOptions = VerifyOptions(),
) -> Verification:
    """Compare `artefact` (merged model, deltas, factors, converted adapter, ONNX export) with `adapter` on `base`.

    Every adapted weight is compared with the method's formula in float64, everything else byte for byte; logits and
    greedy tokens with the live, unmerged adapter. Raises InputError for what is no artefact, MissingDependencyError
    where the extra `verify` (or `onnx`) is not installed.

    Example:
        >>> report = verify("base", "adapter", "merged")
        >>> assert report.passed, report.problems
    """
    from .verify import artefact_kind
    from .verify import verify as run

    onnx = None
    if artefact_kind(resolve(artefact)) == "onnx":  # a wing: imported by name, as the table of commands does
        onnx = importlib.import_module("adapter_merge.export.verification").verify_onnx
    return Verification(run(base, adapter, artefact, onnx=onnx, **_keywords(options)))


def inspect(
    adapter: str | Path, base: str | Path | None = None, options: InspectOptions = InspectOptions()
) -> Inspection:
    """Describe `adapter`, and its fit to `base` where one is given, from headers and config; no weight is read.

    A bad adapter raises nothing: `problems` of the result holds everything that was found.

    Example:
        >>> inspect("adapter", "base").problems
        ()
    """
    from .inspect import inspect_adapter

    return Inspection(inspect_adapter(adapter, base, options.reading, options.base_kind))


def load_adapter(adapter: str | Path, reading: ReadOptions | None = None, *, base: str | Path | None = None) -> Adapter:
    """Open `adapter` (a folder, file or hub id of any format) from its headers and config; no weight is read.

    reading: what the adapter's files do not say. base: for formats whose names only a base resolves (kohya), or whose
    trained heads only a base tells from its own weights (a DCFT checkpoint). Returns the adapter: its method, its
    modules with shape (out, in) and rank, its replacements. Raises AdapterError or UnsupportedError.

    Example:
        >>> load_adapter("adapter").method
        'LoRA'
    """
    return open_adapter(adapter, reading, open_checkpoint(base) if base is not None else None)
