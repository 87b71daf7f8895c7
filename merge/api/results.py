"""What each job of the public interface returns. `as_json` gives the manifest, or the object that --json prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_merge.engine.weight_change import WeightChange


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter, as the manifest names it."""

    name: str
    path: Path
    method: str  # LoRA, DoRA, DCFT, ...
    modules: int  # adapted weights
    sha256: str  # over the adapter's files
    base_kind: str | None  # original or residual, where the adapter was bound to a base
    evidence: str | None  # how that was decided


@dataclass(frozen=True)
class WeightFactors:
    """The factors of one weight, and their error against the adapter's delta dW."""

    rank: int
    relative_error: float  # ||dW - up down||_F / ||dW||_F


@dataclass(frozen=True)
class Certificate:
    """The errors of all factors together."""

    weights: int
    ranks: tuple[int, int]  # smallest and largest
    max_relative_error: float
    mean_relative_error: float
    max_spectral_error: float
    mean_energy: float  # of dW, kept


@dataclass(frozen=True)
class Written:
    """A folder that a job wrote, or with `dry_run` would write."""

    output: Path
    _manifest: dict[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The content of the folder's adapter_merge.json."""
        return self._manifest

    @property
    def artefact(self) -> str:
        """merged model, deltas, factors, adapter or extracted adapter."""
        return str(self._manifest["artefact"])

    @property
    def dry_run(self) -> bool:
        return bool(self._manifest.get("dry_run"))

    @property
    def nbytes(self) -> int | None:
        """The bytes of the output's weights; None where the job does not know them beforehand."""
        return self._manifest.get("bytes")

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._manifest.get("warnings", ()))

    @property
    def files(self) -> Mapping[str, str]:
        """sha256 of every file of the output but its manifest, by path."""
        return dict(self._manifest.get("files", {}))

    @property
    def adapters(self) -> tuple[AdapterEntry, ...]:
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
    """A merged model, or a part of one."""

    @property
    def weights(self) -> Mapping[str, WeightChange]:
        """By tensor name; empty for a dry run."""
        return {name: WeightChange(**found) for name, found in self._manifest.get("layers", {}).items()}

    @property
    def part(self) -> str | None:
        """I/N for a part of a split merge, whose output is not there yet."""
        return self._manifest.get("part")


class DeltaResult(Written):
    """Dense deltas in delta.safetensors."""

    @property
    def not_included(self) -> tuple[str, ...]:
        """Tensors that the adapter replaces as a whole: a delta says nothing of them."""
        return tuple(self._manifest["not_included"])


class ConvertResult(Written):
    """A safe adapter folder."""


class ExtractResult(Written):
    """A PEFT folder extracted from two checkpoints."""

    @property
    def form(self) -> str:
        """lora, or lora+row_scale."""
        return str(self._manifest["form"])

    @property
    def weights(self) -> Mapping[str, WeightFactors]:
        """By module name; empty for a dry run."""
        return {
            name: WeightFactors(found["rank"], found["relative_error"])
            for name, found in self._manifest.get("layers", {}).items()
        }


class FactorResult(ExtractResult):
    """A PEFT folder of low-rank factors."""

    @property
    def exact(self) -> bool:
        return bool(self._manifest["exact"])

    @property
    def certificate(self) -> Certificate:
        found = self._manifest["certificate"]
        return Certificate(
            found["weights"],
            (found["ranks"][0], found["ranks"][1]),
            found["max_relative_error"],
            found["mean_relative_error"],
            found["max_spectral_error"],
            found["mean_energy"],
        )


@dataclass(frozen=True)
class RestoreResult:
    """The base's files, each proved by its sha256."""

    output: Path
    files: Mapping[str, str]  # sha256 by path


@dataclass(frozen=True)
class Inspection:
    """What an adapter is, and how it fits a base."""

    _report: dict[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The object that `inspect --json` prints."""
        return self._report

    @property
    def method(self) -> str | None:
        """None where the adapter could not be read: see `problems`."""
        return self._report.get("method")

    @property
    def modules(self) -> int:
        return int(self._report.get("modules", 0))

    @property
    def base_model(self) -> str | None:
        """The base that the adapter's config names."""
        return self._report.get("base_model")

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(str(problem["cause"]) for problem in self._report["problems"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is possible, but seldom meant: layers left out, changes larger than the weights."""
        return tuple(self._report.get("warnings", ()))

    @property
    def fits(self) -> bool | None:
        """True or False where a base was given, else None."""
        return None if "base" not in self._report and not self.problems else not self.problems


@dataclass(frozen=True)
class ParityFigures:
    """Logits of the artefact beside those of the adapter as trained."""

    max_difference: float
    mean_difference: float
    effect: float  # max |dlogit| between the base and the adapter
    greedy_equal: int
    greedy_total: int


@dataclass(frozen=True)
class Verification:
    """Whether an artefact computes what the adapter was trained to compute."""

    _report: dict[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The object that `verify --json` prints."""
        return self._report

    @property
    def passed(self) -> bool:
        return bool(self._report["passed"])

    @property
    def artefact(self) -> str:
        """merged model, deltas, factors, adapter or onnx."""
        return str(self._report["artefact"])

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it did not pass."""
        return tuple(self._report["problems"])

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._report.get("notes", ()))

    @property
    def relative_errors(self) -> Mapping[str, float]:
        """The relative error of dW of every compared weight, by name."""
        return {name: found["relative_error"] for name, found in self._report.get("layers", {}).items()}

    @property
    def logits(self) -> ParityFigures | None:
        """In the widest precision that was asked; None where weights alone were compared."""
        found = self._report.get("logits_float64") or self._report.get("logits")
        if not found:
            return None
        keys = ("max_difference", "mean_difference", "effect", "greedy_equal", "greedy_total")
        return ParityFigures(*(found[key] for key in keys))
