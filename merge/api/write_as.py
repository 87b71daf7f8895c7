"""Writing of a quantised base's adapted weights: checks of the option `--as`, and the certificate of requantisation."""

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
    """Raise InputError where `write_as` is missing for a quantised base, or stated for a base with plain weights."""
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
            f"{base.folder}: the base is quantised, so state how to write the merged weights",
            expected="--as bfloat16, float16 or float32: every weight is dequantised, adapted and rounded once; or "
            "--as same: adapted weights are quantised again, which loses a measured part of the change",
            got=", ".join(f"{count} weights of {scheme}" for scheme, count in schemes.most_common()),
            hint="a dequantised output is larger than the base, by the ratio of the dtypes",
        )
    if options.dtype is not None and options.write_as == SAME:
        raise InputError("--as same and --dtype contradict each other", hint="the base's scheme has its own dtypes")
    if options.dtype not in (None, options.write_as):
        raise InputError(
            f"--as {options.write_as} and --dtype {options.dtype} contradict each other",
            expected="one dtype; --as alone keeps the dtype of tensors that are not quantised",
        )


def _check_texts(base: Checkpoint, options: MergeOptions, texts: Sequence[str]) -> None:
    """Raise InputError where `texts` cannot be used with the other options or the base."""
    if options.write_as != SAME:
        raise InputError(
            "--texts measures the loss of quantising again, and needs --as same",
            got=f"--as {options.write_as}" if options.write_as else "no --as",
            hint="adapter-merge verify compares the logits of other merges",
        )
    if options.part is not None:
        raise InputError(
            "--texts needs the whole model, and --shards writes only a part", hint="state --texts with --finish"
        )
    check_texts(base.folder, texts)


def computed_dtype(base: Checkpoint, options: MergeOptions) -> str | None:
    """Return the safetensors dtype in which packed weights of `base` are written; None where none are dequantised."""
    if base.stored is None or options.write_as in (None, SAME):
        return None
    return DTYPES[str(options.write_as)]


def certify(layers: Mapping[str, Mapping[str, Any]], least: float) -> dict[str, Any]:
    """Return the retention and error of all requantised weights together, and of the worst weight.

    layers: figures by weight; only those with a retention are counted. Raises ParityError where the retention of all
    weights together is below `least`, UnsupportedError where the adapter changes no quantised weight.
    """
    measured = {name: figures for name, figures in layers.items() if figures.get("retention") is not None}
    if not measured:
        raise UnsupportedError(
            "--as same: the adapter changes no quantised weight", hint="--as bfloat16, or merge into the plain weights"
        )
    total = sum(item["delta_norm"] ** 2 for item in measured.values())
    kept_square = sum(item["retention"] * item["delta_norm"] ** 2 for item in measured.values())
    error = sum((item["rounding"] * item["delta_norm"]) ** 2 for item in measured.values())
    worst = min(measured, key=lambda name: abs(measured[name]["retention"]))
    certificate = {
        "weights": len(measured),
        "retention": kept_square / total if total else 1.0,
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
