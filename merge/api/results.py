"""Results of the public functions. `as_json` returns the manifest, or the object that --json prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_merge.engine.weight_change import WeightChange


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of an output, as the manifest describes it.

    Example:
        >>> merge("base", "adapter", "merged", MergeOptions(overwrite=True)).adapters[0].method
        'LoRA'
    """

    name: str
    path: Path
    method: str  # LoRA, DoRA, DCFT, ...
    modules: int  # number of adapted weights
    sha256: str  # of the adapter's files
    base_kind: str | None  # "original" or "residual"; None where the adapter was not bound to a base
    evidence: str | None  # why base_kind was chosen


@dataclass(frozen=True)
class WeightFactors:
    """The rank of one weight's factors, and their error against the adapter's delta dW.

    Example:
        >>> max(item.rank for item in factor("base", "adapter", "low", FactorOptions(rank=1)).weights.values())
        1
    """

    rank: int
    relative_error: float  # ||dW - up down||_F / ||dW||_F


@dataclass(frozen=True)
class Certificate:
    """The errors of all factors of a folder together.

    The relative error of a weight is ||dW - up down||_F / ||dW||_F, its spectral error the same quotient of spectral
    norms, its energy the share of ||dW||_F^2 that the factors keep.

    Example:
        >>> factor("base", "adapter", "exact").certificate.max_relative_error < 1e-5
        True
    """

    weights: int  # number of weights
    ranks: tuple[int, int]  # smallest and largest
    max_relative_error: float
    mean_relative_error: float
    max_spectral_error: float
    mean_energy: float


@dataclass(frozen=True)
class Written:
    """An output folder that was written, or that would be written without `dry_run`."""

    output: Path
    _manifest: dict[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The content of the folder's adapter_merge.json."""
        return self._manifest

    @property
    def artefact(self) -> str:
        """Kind of the output: merged model, deltas, factors, adapter or extracted adapter."""
        return str(self._manifest["artefact"])

    @property
    def dry_run(self) -> bool:
        """True where nothing was written."""
        return bool(self._manifest.get("dry_run"))

    @property
    def nbytes(self) -> int | None:
        """Bytes of the output's weights, for a dry run of `merge` or `delta` and for `factor`; else None."""
        return self._manifest.get("bytes")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the output, as the manifest holds them."""
        return tuple(self._manifest.get("warnings", ()))

    @property
    def files(self) -> Mapping[str, str]:
        """sha256 of every file of the output except its manifest, by path in the output."""
        return dict(self._manifest.get("files", {}))

    @property
    def adapters(self) -> tuple[AdapterEntry, ...]:
        """The adapters that the output was made from."""
        return tuple(
            AdapterEntry(
                entry["name"],
                Path(entry["path"]),
                entry["method"],
                entry["modules"],
                entry["sha256"],
                entry.get("base_kind"),
                entry.get("evidence"),
            )
            for entry in self._manifest.get("adapters", ())
        )


class MergeResult(Written):
    """Result of `merge`: a merged model, or a part of a split merge.

    Example:
        >>> merge("base", "adapter", "merged", MergeOptions(overwrite=True)).warnings
        ()
    """

    @property
    def weights(self) -> Mapping[str, WeightChange]:
        """The change of each adapted weight, by tensor name; empty for a dry run."""
        return {name: WeightChange(**figures) for name, figures in self._manifest.get("layers", {}).items()}

    @property
    def part(self) -> str | None:
        """I/N for a part of a split merge, whose output is written once all parts are finished; else None."""
        return self._manifest.get("part")


class DeltaResult(Written):
    """Result of `delta`: dense deltas in delta.safetensors.

    Example:
        >>> sorted(delta("base", "adapter", "dense").files)
        ['delta.safetensors']
    """

    @property
    def not_included(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter replaces in full; delta.safetensors does not hold them."""
        return tuple(self._manifest["not_included"])


class ConvertResult(Written):
    """Result of `convert`: a safe adapter folder.

    Example:
        >>> "adapter_model.safetensors" in convert("adapter", "converted").files
        True
    """


class ExtractResult(Written):
    """Result of `extract`: a PEFT folder extracted from two checkpoints.

    Example:
        >>> result = extract("base", "merged", "rank-2", ExtractOptions(rank=2))
        >>> max(item.rank for item in result.weights.values())
        2
    """

    @property
    def form(self) -> str:
        """The form of the factors: lora, or lora+row_scale."""
        return str(self._manifest["form"])

    @property
    def weights(self) -> Mapping[str, WeightFactors]:
        """The rank and error of each weight's factors, by module name; empty for a dry run."""
        return {
            name: WeightFactors(figures["rank"], figures["relative_error"])
            for name, figures in self._manifest.get("layers", {}).items()
        }


class FactorResult(ExtractResult):
    """Result of `factor`: a folder of low-rank factors.

    Example:
        >>> factor("base", "adapter", "exact", FactorOptions(overwrite=True)).exact
        True
    """

    @property
    def exact(self) -> bool:
        """True where the relative error of every weight is at most 1e-5 and no rank or budget was stated."""
        return bool(self._manifest["exact"])

    @property
    def certificate(self) -> Certificate:
        """The errors of all factors together."""
        errors = self._manifest["certificate"]
        return Certificate(
            errors["weights"],
            (errors["ranks"][0], errors["ranks"][1]),
            errors["max_relative_error"],
            errors["mean_relative_error"],
            errors["max_spectral_error"],
            errors["mean_energy"],
        )


@dataclass(frozen=True)
class RestoreResult:
    """Result of `restore`: the base's files, each checked against its sha256.

    Example:
        >>> "config.json" in restore("merged", "restored", RestoreOptions(base="base")).files
        True
    """

    output: Path
    files: Mapping[str, str]  # sha256 by path in the output


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`: a description of an adapter, and how it fits a base.

    Example:
        >>> inspect("adapter").method
        'LoRA'
    """

    _report: dict[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The object that `inspect --json` prints."""
        return self._report

    @property
    def method(self) -> str | None:
        """The adapter's method, such as LoRA or DuDe; None where the adapter could not be read (see `problems`)."""
        return self._report.get("method")

    @property
    def modules(self) -> int:
        """Number of adapted weights."""
        return int(self._report.get("modules", 0))

    @property
    def base_model(self) -> str | None:
        """The base that the adapter's config names."""
        return self._report.get("base_model")

    @property
    def problems(self) -> tuple[str, ...]:
        """The cause of every problem of the adapter, or of its fit to the base."""
        return tuple(str(problem["cause"]) for problem in self._report["problems"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Unusual properties that are no errors, such as layers left out or changes larger than the weights."""
        return tuple(self._report.get("warnings", ()))

    @property
    def fits(self) -> bool | None:
        """Whether the adapter fits the base; None where no base was given and no problem was found."""
        return None if "base" not in self._report and not self.problems else not self.problems


@dataclass(frozen=True)
class ParityFigures:
    """Differences between the logits of an artefact and those of the adapter as trained.

    Example:
        >>> parity = verify("base", "adapter", "merged").logits
        >>> parity.greedy_equal == parity.greedy_total
        True
    """

    max_difference: float  # max |dlogit|
    mean_difference: float  # mean |dlogit|
    effect: float  # max |dlogit| between the base and the adapter as trained
    greedy_equal: int  # greedy tokens that are equal
    greedy_total: int  # greedy tokens that were compared


@dataclass(frozen=True)
class Verification:
    """Result of `verify`: whether an artefact computes what the adapter was trained to compute.

    Example:
        >>> verify("base", "adapter", "merged").artefact
        'merged model'
    """

    _report: dict[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The object that `verify --json` prints."""
        return self._report

    @property
    def passed(self) -> bool:
        """True where no problem was found."""
        return bool(self._report["passed"])

    @property
    def artefact(self) -> str:
        """Kind of the artefact: merged model, deltas, factors, adapter or onnx."""
        return str(self._report["artefact"])

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why the artefact did not pass; empty where it passed."""
        return tuple(self._report["problems"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks that do not decide whether the artefact passes."""
        return tuple(self._report.get("notes", ()))

    @property
    def relative_errors(self) -> Mapping[str, float]:
        """||dW of the artefact - trained dW|| / ||trained dW|| of every compared weight, by name."""
        return {name: figures["relative_error"] for name, figures in self._report.get("layers", {}).items()}

    @property
    def logits(self) -> ParityFigures | None:
        """Differences of the logits, in float64 where float32 did not pass; None where only weights were compared."""
        figures = self._report.get("logits_float64") or self._report.get("logits")
        if not figures:
            return None
        keys = ("max_difference", "mean_difference", "effect", "greedy_equal", "greedy_total")
        return ParityFigures(*(figures[key] for key in keys))
