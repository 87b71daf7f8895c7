"""The report's first line: what is known of the artefact, in one sentence, from the report's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

UNVERIFIED = "Not verified here: report --parity FILE takes what adapter-merge verify --json printed."


def verdict(content: Mapping[str, Any]) -> dict[str, str]:
    """level (good, bad, loss or none), title and detail. What fails comes first, then what was lost, then what passed.

    Comparisons count that are about the report's own folder.
    """
    lines = [line for line in content["parity"] if line["about"] and line["passed"] is not None]
    failed = [line for line in lines if not line["passed"]]
    contradictions = [text for entry in content["adapters"] for text in entry.get("contradictions") or ()]
    if contradictions:
        return _verdict("bad", "The files contradict this base", "; ".join(map(str, contradictions)))
    if failed:
        some = f"{len(failed)} of {len(lines)} comparisons differ" if len(lines) > 1 else "Differs"
        return _verdict("bad", f"{some} from the adapter as trained", "; ".join(map(describe, failed)))
    certificate = content.get("certificate") or {}
    if certificate.get("retention") is not None:
        detail = f"Quantised again; the least is {certificate['worst_retention']:.2f} ({certificate['worst_weight']})."
        return _verdict("loss", f"Keeps {percent(certificate['retention'])} of the change", _passed(lines, detail))
    if content["artefact"] == "factors" and content.get("exact") is False:
        detail = f"Truncated: relative error of ΔW {certificate['max_relative_error']:.2g} at most, "
        detail += f"{certificate['mean_relative_error']:.2g} in the mean."
        return _verdict(
            "loss", f"Keeps {certificate['mean_energy']:.1%} of the change's energy", _passed(lines, detail)
        )
    if lines:
        title = "Computes what was trained"
        return _verdict("good", title, "; ".join(map(describe, lines)))
    if content["artefact"] == "adapter":
        return _verdict("none", *_change(content))
    title = "Exact by its form" if content.get("exact") else "Not verified"
    return _verdict("none", title, UNVERIFIED)


def percent(value: float) -> str:
    """0.87919 -> 87.9 %; never 100 % for less than all."""
    if value >= 1 - 1e-9:
        return "100 %"
    return f"{100 * value:.1f} %" if value < 0.9995 else f"{100 * value:.6f}".rstrip("0") + " %"


def describe(line: Mapping[str, Any]) -> str:
    """One comparison in words."""
    parts = []
    if line["max_dlogit"] is not None:
        parts.append(f"largest |Δlogit| {line['max_dlogit']:.2g}")
    if line["greedy_total"] is not None:
        parts.append(f"{line['greedy_equal']} of {line['greedy_total']} greedy tokens equal")
    if line["weight_error"] is not None:
        parts.append(f"relative error of ΔW at most {line['weight_error']:.2g}")
    return f"{line['label']}: {', '.join(parts)}" if parts else str(line["label"])


def _passed(lines: list[Mapping[str, Any]], detail: str) -> str:
    """The detail, and that the artefact passed where it was verified."""
    return f"{detail} verify passed it: {'; '.join(map(describe, lines))}" if lines else f"{detail} {UNVERIFIED}"


def _change(content: Mapping[str, Any]) -> tuple[str, str]:
    """How much an adapter changes its weights."""
    modules = content["modules"]
    sizes = {entry["name"]: entry["relative_delta"] for entry in modules if entry.get("relative_delta") is not None}
    if not sizes:
        return f"Changes {len(modules)} weights", "How much beside the weights themselves is known with --base."
    largest = max(sizes, key=lambda name: sizes[name])
    title = f"Changes {len(sizes)} weights by {percent(median(sizes.values()))} in the median"
    return title, f"The largest change is {percent(sizes[largest])}, of {largest}: |ΔW| / |W|."


def _verdict(level: str, title: str, detail: str) -> dict[str, str]:
    return {"level": level, "title": title, "detail": detail}
