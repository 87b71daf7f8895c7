"""Comparisons with the adapter as trained, from the manifest and from files with the output of `verify --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError
from adapter_merge.storage.checkpoint import read_json


def parity_lines(folder: Path, manifest: Mapping[str, Any] | None, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return all comparisons that the manifest or `files` (the output of `verify --json`) hold, one line each.

    "about" of a line is True where the comparison states the path of `folder`, as its artefact or its adapter. Raises
    InputError for a file that is not the output of verify.
    """
    lines = []
    end = ((manifest or {}).get("certificate") or {}).get("end_to_end")
    if end:
        keys = ("max_dlogit", "mean_dlogit", "greedy_equal", "greedy_total", "effect")
        lines.append(_line("factors, end to end", {key: end.get(key) for key in keys}, about=True))
    for name, entry in ((manifest or {}).get("parity") or {}).items():
        figures = _figures({"logits": entry, "tolerance": entry.get("tolerance")})
        lines.append(_line(f"export, {name}", figures, about=True, passed=True))  # export only writes models that pass
    for file in files:
        lines.append(_file_line(read_json(file), file, folder.resolve()))
    return lines


def _line(label: str, figures: Mapping[str, Any], about: bool, passed: bool | None = None) -> dict[str, Any]:
    keys = ("max_dlogit", "mean_dlogit", "greedy_equal", "greedy_total", "effect", "bar", "weight_error", "weights")
    return {"label": label, "about": about, "passed": passed, **{key: figures.get(key) for key in keys}}


def _figures(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of one comparison under the report's keys."""
    logits = content.get("logits_float64") or content.get("logits") or {}
    server = content.get("log_probabilities") or {}
    layers = content.get("layers") or {}
    errors = [entry["relative_error"] for entry in layers.values() if entry.get("relative_error") is not None]
    return {
        "max_dlogit": logits.get("max_difference", (server.get("difference") or {}).get("max")),
        "mean_dlogit": logits.get("mean_difference", (server.get("difference") or {}).get("mean")),
        "greedy_equal": logits.get("greedy_equal"),
        "greedy_total": logits.get("greedy_total"),
        "effect": logits.get("effect"),
        "bar": content.get("tolerance") if isinstance(content.get("tolerance"), int | float) else content.get("bar"),
        "weight_error": max(errors, default=None),
        "weights": len(layers) or None,
    }


def _file_line(content: Any, file: Path, folder: Path) -> dict[str, Any]:
    """Return one line from the output of verify. Raises InputError for other content."""
    if not isinstance(content, dict) or not isinstance(content.get("passed"), bool) or "artefact" not in content:
        raise InputError(f"{file}: not a verification", expected="the output of adapter-merge verify --json")
    adapter = content.get("adapter")
    stated = [content.get("path"), adapter.get("path") if isinstance(adapter, dict) else None]
    about = any(isinstance(path, str) and Path(path).resolve() == folder for path in stated)
    label = f"{content['artefact']} {Path(str(content.get('path', ''))).name}".strip()
    if content["artefact"] == "onnx":
        label = " ".join(str(content[key]) for key in ("mode", "precision") if content.get(key)) + " ONNX"
        label += f", {adapter}" if isinstance(adapter, str) else ""
    elif content["artefact"] == "server":
        label = f"server, model {content.get('model')}"
    return _line(label, _figures(content), about, content["passed"])
