"""Every artefact that an adapter can be turned into, and what proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trained_adapters import Trained

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, DeltaOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.restore import restore
from adapter_merge.api.verify import verify
from adapter_merge.combine.recipe import Recipe
from adapter_merge.errors import AdapterMergeError
from adapter_merge.outputs.integrity import check_integrity, check_restored
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter
from adapter_merge.serve.conversion.stated_settings import Stated


@dataclass(frozen=True)
class Verdict:
    """What a check said: passed, or why not. `crash` is an exception that is none of ours."""

    passed: bool
    why: str = ""
    crash: bool = False


Make = Callable[[Trained, Path], Path]  # writes below a folder that is there; the artefact's folder


def _merged(trained: Trained, place: Path) -> Path:
    merge(trained.base, trained.adapter, place / "merged", _options(trained, write_as="float32"))
    return place / "merged"


def _merged_bfloat16(trained: Trained, place: Path) -> Path:
    options = (
        _options(trained, write_as="bfloat16") if is_quantised(trained.base) else _options(trained, dtype="bfloat16")
    )
    merge(trained.base, trained.adapter, place / "merged", options)
    return place / "merged"


def _merged_same(trained: Trained, place: Path) -> Path:
    if not is_quantised(trained.base):
        raise NotForItError("of a quantised base")
    merge(trained.base, trained.adapter, place / "merged", _options(trained, write_as="same"))
    return place / "merged"


def is_quantised(base: Path | None) -> bool:
    """True for a base whose merge has to be told how to write it."""
    return base is not None and open_base(base).stored is not None


def _options(trained: Trained, *, write_as: str | None = None, **stated: Any) -> MergeOptions:
    """Options of a merge; write_as counts where the base is quantised."""
    taken = write_as if is_quantised(trained.base) else None
    return MergeOptions(device="cpu", reading=trained.options, write_as=taken, **stated)


def _delta(trained: Trained, place: Path) -> Path:
    delta(trained.base, trained.adapter, place / "delta", DeltaOptions(device="cpu", reading=trained.options))
    return place / "delta"


def _factors(trained: Trained, place: Path) -> Path:
    factor(trained.base, trained.adapter, place / "factors", FactorOptions(device="cpu", reading=trained.options))
    return place / "factors"


def _truncated(trained: Trained, place: Path) -> Path:
    factor(
        trained.base, trained.adapter, place / "truncated", FactorOptions(device="cpu", reading=trained.options, rank=2)
    )
    return place / "truncated"


def _truncated_scaled(trained: Trained, place: Path) -> Path:
    options: dict[str, Any] = {"rank": 2, "keep_scale": True}
    factor(
        trained.base,
        trained.adapter,
        place / "truncated",
        FactorOptions(device="cpu", reading=trained.options, **options),
    )
    return place / "truncated"


def _converted(trained: Trained, place: Path) -> Path:
    one = _only(trained)
    convert(one, place / "converted", ConvertOptions(base=trained.base, reading=trained.options))
    return place / "converted"


def _restored(trained: Trained, place: Path) -> Path:
    merge(trained.base, trained.adapter, place / "of", _options(trained, write_as="same", keep_preimage=True))
    restore(place / "of", place / "restored")
    return place / "restored"


def _served(trained: Trained, place: Path) -> Path:
    if trained.base is None:
        raise NotForItError("serve takes a base and adapters")
    stated = Stated.of(None, trained.options) if trained.options is not None else None
    return Converter(trained.base, Cache(place / "cache")).obtain(_only(trained), stated).folder


def _onnx(mode: str, precision: str = "fp32") -> Make:
    def make(trained: Trained, place: Path) -> Path:
        from adapter_merge.export.exporting import export_model

        if trained.base is None:
            raise NotForItError("export takes a base and adapters")
        if trained.options is not None:
            raise NotForItError("export takes adapters that need no options")
        export_model(trained.base, {"a": Path(_only(trained))}, place / "onnx", mode=mode, precision=precision)
        return place / "onnx"

    return make


class NotForItError(Exception):
    """There is no such artefact of this kind of adapter, by the command's own arguments."""


def _only(trained: Trained) -> str | Path:
    if isinstance(trained.adapter, Recipe):
        raise NotForItError("of one adapter alone")
    return trained.adapter


ARTEFACTS: dict[str, Make] = {
    "merged": _merged,
    "merged, bfloat16": _merged_bfloat16,
    "merged, same": _merged_same,
    "delta": _delta,
    "factors": _factors,
    "truncated": _truncated,
    "truncated, row scales": _truncated_scaled,
    "converted": _converted,
    "restored": _restored,
    "served": _served,
}
ONNX: dict[str, Make] = {f"ONNX {mode}": _onnx(mode) for mode in ("merged", "switchable", "batched")}


def judge(trained: Trained, artefact: str, folder: Path, made_in: Path, *, weights_only: bool = True) -> Verdict:
    """The verdict of `verify BASE ADAPTER ARTEFACT`; of a restored base, of `verify MERGED RESTORED`.

    made_in: where the right artefact was made, and what else was made for it.
    """
    try:
        if artefact == "restored":
            check_restored(made_in / "of", folder)
            return Verdict(True)
        report = verify(
            trained.base,
            trained.adapter,
            folder,
            VerifyOptions(reading=trained.options, generated=4, weights_only=weights_only),
        ).as_json()
    except AdapterMergeError as refusal:
        return Verdict(False, str(refusal).split("\n")[0])
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}".split("\n")[0], crash=True)
    return Verdict(report["passed"], "; ".join(report["problems"]))


def judge_hashes(folder: Path) -> Verdict:
    """The verdict of `verify ARTEFACT`."""
    try:
        check_integrity(folder)
    except AdapterMergeError as refusal:
        return Verdict(False, str(refusal).split("\n")[0])
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}".split("\n")[0], crash=True)
    return Verdict(True)
