"""How a quantised base is written again: the choice of `--as`, which only the user can make, and its certificate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adapter_merge.errors import InputError, ParityError, UnsupportedError
from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.tensor_io import SAFETENSORS_DTYPES as DTYPES
from adapter_merge.verification.text_divergence import check_texts

from .options import MergeOptions

SAME = "same"


def check_write_as(base: Checkpoint, options: MergeOptions) -> None:
    """Raise InputError where `options` do not choose how to write a quantised base, or choose it for a plain one."""
    if options.texts is not None:
        _check_texts(base, options, options.texts)
    schemes = Counter(weight.scheme for weight in packed_weights(base).values())
    if not schemes:
        if options.write_as is not None:
            raise InputError(
                f"{base.folder}: --as {options.write_as} is for a quantised base, and this one has plain weights",
                hint="--dtype chooses the dtype of the output",
            )
        return
    if options.write_as is None:
        raise InputError(
            f"{base.folder}: the base is quantised, and how to write merged weights is your choice",
            expected="--as bfloat16, float16 or float32: every weight dequantised, adapted and rounded once; or "
            "--as same: adapted weights quantised again, which loses part of the adapter and is measured",
            got=", ".join(f"{count} weights of {scheme}" for scheme, count in schemes.most_common()),
            hint="a dequantised output is larger than the base by the ratio of the dtypes",
        )
    if options.dtype is not None and options.write_as == SAME:
        raise InputError("--as same and --dtype contradict each other", hint="the base's scheme has its own dtypes")
    if options.dtype not in (None, options.write_as):
        raise InputError(
            f"--as {options.write_as} and --dtype {options.dtype} contradict each other",
            expected="one dtype: --as alone keeps the dtype of tensors that are not quantised",
        )


def _check_texts(base: Checkpoint, options: MergeOptions, texts: Sequence[str]) -> None:
    if options.write_as != SAME:
        raise InputError(
            "--texts measures what quantising again loses, and goes with --as same",
            got=f"--as {options.write_as}" if options.write_as else "no --as",
            hint="verify compares the logits of other merges",
        )
    if options.part is not None:
        raise InputError("--texts needs the whole model, and --shards makes a part", hint="state --texts with --finish")
    check_texts(base.folder, texts)


def computed_dtype(base: Checkpoint, options: MergeOptions) -> str | None:
    """Return the safetensors dtype for the packed weights of `base`; None where it has none or keeps their scheme."""
    if base.stored is None or options.write_as in (None, SAME):
        return None
    return DTYPES[str(options.write_as)]


def certify(layers: Mapping[str, Mapping[str, Any]], least: float) -> dict[str, Any]:
    """Return what quantising again has kept of the change of all weights together, and of the worst one.

    layers: figures by weight, those with a retention. Raises ParityError where the retention is below `least`.
    """
    measured = {name: found for name, found in layers.items() if found.get("retention") is not None}
    if not measured:
        raise UnsupportedError(
            "--as same: the adapter changes no quantised weight", hint="--as bfloat16, or merge into the plain weights"
        )
    total = sum(found["delta_norm"] ** 2 for found in measured.values())
    kept = sum(found["retention"] * found["delta_norm"] ** 2 for found in measured.values())
    error = sum((found["rounding"] * found["delta_norm"]) ** 2 for found in measured.values())
    worst = min(measured, key=lambda name: abs(measured[name]["retention"]))
    certificate = {
        "weights": len(measured),
        "retention": kept / total if total else 1.0,
        "relative_error": (error / total) ** 0.5 if total else 0.0,
        "worst_weight": worst,
        "worst_retention": measured[worst]["retention"],
        "min_retention": least,
    }
    if not certificate["retention"] >= least:
        raise ParityError(
            f"--as same: quantised again, the weights keep {certificate['retention']:.2f} of the adapter's change",
            expected=f"at least {least:g} (--min-retention)",
            got=f"retention <Q(W') - W, dW> / |dW|^2 of {len(measured)} weights; least {worst}: "
            f"{certificate['worst_retention']:.2f}; |Q(W') - W'| / |dW| {certificate['relative_error']:.2f}",
            hint="serve the base with the adapter beside it, or merge with --as bfloat16",
        )
    return certificate
