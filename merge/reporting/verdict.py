"""Verdict of the report: one sentence on what is known about the artefact, from the report's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

UNVERIFIED = "Not verified here: add the output of adapter-merge verify --json with report --parity FILE."


def verdict(content: Mapping[str, Any]) -> dict[str, str]:
    """Return level (good, bad, loss or none), title and detail of the verdict.

    A failure takes precedence over a loss, and a loss over a comparison that passed. Only comparisons of the report's
    own folder count.
    """
    lines = [line for line in content["parity"] if line["about"] and line["passed"] is not None]
    failed = [line for line in lines if not line["passed"]]
    contradictions = [text for entry in content["adapters"] for text in entry.get("contradictions") or ()]
    if contradictions:
        return _verdict("bad", "The files contradict this base", "; ".join(map(str, contradictions)))
    if failed:
        differences = f"{len(failed)} of {len(lines)} comparisons differ" if len(lines) > 1 else "Differs"
        return _verdict("bad", f"{differences} from the adapter as trained", "; ".join(map(describe, failed)))
    certificate = content.get("certificate") or {}
    if certificate.get("retention") is not None:
        smallest = f"{certificate['worst_retention']:.2f} ({certificate['worst_weight']})"
        detail = f"Quantised again; the smallest retention of a weight is {smallest}."
        return _verdict(
            "loss", f"Keeps {percent(certificate['retention'])} of the change", _add_comparisons(lines, detail)
        )
    if content["artefact"] == "factors" and content.get("exact") is False:
        detail = f"Truncated: relative error of ΔW {certificate['max_relative_error']:.2g} at most, "
        detail += f"{certificate['mean_relative_error']:.2g} on average."
        return _verdict(
            "loss", f"Keeps {certificate['mean_energy']:.1%} of the change's energy", _add_comparisons(lines, detail)
        )
    if lines:
        title = "Computes what was trained"
        return _verdict("good", title, "; ".join(map(describe, lines)))
    if content["artefact"] == "adapter":
        return _verdict("none", *_describe_change(content))
    title = "Exact by its form" if content.get("exact") else "Not verified"
    return _verdict("none", title, UNVERIFIED)


def percent(value: float) -> str:
    """Format 0.87919 as "87.9 %", with enough digits that a value below 1 is not shown as 100 %."""
    if value >= 1 - 1e-9:
        return "100 %"
    return f"{100 * value:.1f} %" if value < 0.9995 else f"{100 * value:.6f}".rstrip("0") + " %"


def describe(line: Mapping[str, Any]) -> str:
    """Return one comparison as text."""
    parts = []
    if line["max_dlogit"] is not None:
        parts.append(f"largest |Δlogit| {line['max_dlogit']:.2g}")
    if line["greedy_total"] is not None:
        parts.append(f"{line['greedy_equal']} of {line['greedy_total']} greedy tokens equal")
    if line["weight_error"] is not None:
        parts.append(f"relative error of ΔW at most {line['weight_error']:.2g}")
    return f"{line['label']}: {', '.join(parts)}" if parts else str(line["label"])


def _add_comparisons(lines: list[Mapping[str, Any]], detail: str) -> str:
    """Return `detail` with the comparisons that passed, or with a note that none was made."""
    return f"{detail} Passed by verify: {'; '.join(map(describe, lines))}" if lines else f"{detail} {UNVERIFIED}"


def _describe_change(content: Mapping[str, Any]) -> tuple[str, str]:
    """Return title and detail on how much an adapter changes its weights."""
    modules = content["modules"]
    sizes = {entry["name"]: entry["relative_delta"] for entry in modules if entry.get("relative_delta") is not None}
    if not sizes:
        return f"Changes {len(modules)} weights", "State --base to compare the change with the weights."
    largest = max(sizes, key=lambda name: sizes[name])
    title = f"Changes {len(sizes)} weights by {percent(median(sizes.values()))} (median)"
    return title, f"The largest change is {percent(sizes[largest])}, of {largest}: |ΔW| / |W|."


def _verdict(level: str, title: str, detail: str) -> dict[str, str]:
    return {"level": level, "title": title, "detail": detail}
