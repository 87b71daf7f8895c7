"""Content of the report on an artefact or an adapter, as one JSON object, from which the page and pictures are made.

modules         per weight: layer, kind, shape, rank, |dW| / |W|, errors
energy_curve    cumulative energy of dW against the rank: median and the middle 80 % of the weights
row_scale       histogram of the row scales of DoRA and DuDe
parity          comparisons of weights and logits with the adapter as trained, where they were made
verdict         one sentence on what is known about the artefact
sizes           bytes of base, adapter and artefact
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.api.inspect_artefact import adapters_of
from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.combine.origin import bind_checked
from adapter_merge.engine.weight_pool import weight_pool
from adapter_merge.errors import AdapterMergeError, InputError
from adapter_merge.factoring.certificate import SPECTRUM_LENGTH, relative
from adapter_merge.factoring.factor_folder import ROW_SCALES
from adapter_merge.factoring.weight_factors import Factoriser
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.methods.adapter import Adapter
from adapter_merge.outputs.leftovers import PREIMAGE_FOLDER
from adapter_merge.outputs.manifest import MANIFEST, read_manifest
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import CANDIDATES, Checkpoint, read_weights, resolve
from adapter_merge.storage.tensor_io import read_tensor

from .delta_figures import measure_deltas
from .module_grid import cell_of
from .parity_lines import parity_lines
from .verdict import verdict

BINS = 61  # of the histogram of row scales
CURVE_RANK = 32  # number of singular values that are computed where the manifest holds none
WORST = 5  # number of weights with the largest errors that are named


@dataclass(frozen=True)
class ModuleFigures:
    """Figures of one weight that are measured, where no manifest holds them."""

    shape: tuple[int, int]
    rank: int
    delta_norm: float  # ||dW||_F
    relative_delta: float | None  # None without a base
    singular_values: tuple[float, ...]  # relative to ||dW||_F
    row_scale: Tensor | None  # (out,)


def gather(
    target: str | Path,
    base: str | Path | None = None,
    *,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    parity: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return the report's content.

    target: an adapter or an output of this project. base: None uses the base at the path in the manifest, where it
    still has the same fingerprint. parity: files with the output of `adapter-merge verify --json`. Raises
    AdapterMergeError.
    """
    folder = resolve(target)
    manifest = read_manifest(folder)
    checkpoint = _find_base(base, manifest)
    modules: dict[str, dict[str, Any]] = {}
    figures: dict[str, ModuleFigures] = {}
    opened: Adapter | None = None
    origin: str | None = None
    if (folder / "adapter_config.json").is_file() or manifest is None:
        opened = open_adapter(folder, options, checkpoint)
        checkpoint = checkpoint or opened.own_base
        bound = None
        if checkpoint is not None:
            bound = bind_checked(opened, checkpoint, base_kind or _base_kind_of(manifest))
            origin = bound.origin.text
        figures = measure_adapter(opened, bound)
        for name, figure in figures.items():
            modules[name] = {
                "shape": list(figure.shape),
                "rank": figure.rank,
                "delta_norm": _round_figure(figure.delta_norm),
                "relative_delta": _round_figure(figure.relative_delta),
            }
    elif manifest["artefact"] == "deltas":
        modules = measure_deltas(folder, checkpoint)
    for name, line in (manifest or {}).get("layers", {}).items():
        plain = cell_of(name).name
        entry = modules.setdefault(plain, {})
        entry |= {key: value for key, value in line.items() if value is not None and key != "singular_values"}
    spectra = {
        name: tuple(line.get("singular_values") or ()) for name, line in (manifest or {}).get("layers", {}).items()
    }
    spectra |= {name: figure.singular_values for name, figure in figures.items() if not spectra.get(name)}
    scales = [figure.row_scale for figure in figures.values() if figure.row_scale is not None]
    if (folder / ROW_SCALES).is_file():
        scales = [read_tensor(ref) for ref in read_weights(folder / ROW_SCALES).tensors]
    if not modules and not parity and opened is not None and checkpoint is None:
        raise InputError(
            f"{target}: without the base, the change of none of its {len(opened.modules)} weights is known",
            expected="the base that it was trained on",
            hint="--base BASE",
        )
    content: dict[str, Any] = {
        "title": folder.resolve().name,
        "artefact": manifest["artefact"] if manifest else "adapter",
        "form": (manifest or {}).get("form"),
        "exact": (manifest or {}).get("exact"),
        "base": (manifest or {}).get("base") or _describe_base(checkpoint, opened),
        "origin": origin,
        "adapters": adapters_of(manifest or {}) or ([_describe_adapter(opened)] if opened else []),
        "options": (manifest or {}).get("options"),
        "versions": (manifest or {}).get("versions"),
        "created": (manifest or {}).get("created"),
        "seconds": (manifest or {}).get("seconds"),
        "certificate": (manifest or {}).get("certificate"),
        "calibration": (manifest or {}).get("calibration"),
        "modules": [
            {"name": name, "layer": cell_of(name).layer, "kind": cell_of(name).kind, **entry}
            for name, entry in modules.items()
        ],
        "energy_curve": energy_curve(list(spectra.values()), [entry.get("rank") for entry in modules.values()]),
        "row_scale": histogram(scales),
        "parity": parity_lines(folder, manifest, parity),
        "sizes": _sizes(folder, checkpoint, manifest, opened),
    }
    content["worst"] = worst(content["modules"])
    content["verdict"] = verdict(content)
    return content


def measure_changes(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> dict[str, float]:
    """Return |dW| / |W| by module name, or |dW| without a base, for `inspect --heat-map`."""
    checkpoint = open_base(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    checkpoint = checkpoint or opened.own_base
    measured = measure_adapter(opened, bind_checked(opened, checkpoint, base_kind) if checkpoint is not None else None)
    if checkpoint is None:
        return {name: figures.delta_norm for name, figures in measured.items()}
    return {name: figures.relative_delta or 0.0 for name, figures in measured.items()}


def _base_kind_of(manifest: Mapping[str, Any] | None) -> str | None:
    """Return "original" for factors, which act on the original base; None: decided by the base's weights."""
    return "original" if manifest and manifest["artefact"] == "factors" else None


def _find_base(base: str | Path | None, manifest: Mapping[str, Any] | None) -> Checkpoint | None:
    """Open the stated base, or the manifest's base where it exists with the same fingerprint; None where neither is."""
    if base is not None:
        return open_base(base)
    stated = ((manifest or {}).get("base") or {}).get("path")
    if stated and any((Path(stated) / name).is_file() for name in CANDIDATES):
        checkpoint = open_base(stated)
        if checkpoint.fingerprint == (manifest or {})["base"].get("fingerprint"):
            return checkpoint
    return None


def measure_adapter(opened: Adapter, bound: BoundAdapter | None) -> dict[str, ModuleFigures]:
    """Return figures of every weight of an adapter, with |dW| / |W| where a base is given.

    Without a base, weights whose delta depends on the base are left out.
    """
    pairs: list[tuple[Any, BoundModule | None]]
    if bound is not None:
        pairs = [(item.module, item) for item in bound.modules]
    else:
        pairs = [(module, None) for module in opened.modules if not module.needs_base and module.magnitude is None]

    def measure_pair(pair: tuple[Any, BoundModule | None]) -> tuple[str, ModuleFigures | None]:
        return pair[0].name, _measure(*pair)

    with weight_pool(torch.device("cpu")) as run:
        return {name: figure for name, figure in run(measure_pair, pairs) if figure is not None}


def _measure(module: Any, weight: BoundModule | None) -> ModuleFigures | None:
    """Return the figures of one weight; None where its delta has no spectrum (a bias, an edit without factors)."""
    try:
        factoriser = Factoriser(module, weight, torch.device("cpu"))
        spectrum = factoriser.spectrum(min(CURVE_RANK, *module.shape))
    except AdapterMergeError:
        return None
    norm = math.sqrt(spectrum.total)
    weight_norm = math.sqrt(factoriser.delta.base_total) if weight is not None else None
    values = tuple(math.sqrt(float(square)) / norm if norm else 0.0 for square in spectrum.squares[:SPECTRUM_LENGTH])
    return ModuleFigures(
        module.shape,
        module.rank,
        norm,
        None if weight_norm is None else relative(norm, weight_norm),
        values,
        factoriser.delta.scale if weight is not None and factoriser.scaled else None,
    )


def energy_curve(spectra: Sequence[Sequence[float]], chosen: Sequence[int | None]) -> dict[str, Any] | None:
    """Return the cumulative energy by rank over all weights with a spectrum; None where there is none.

    spectra: singular values relative to the Frobenius norm of dW, in descending order. chosen: ranks of the factors.
    """
    known = [values for values in spectra if values]
    if not known:
        return None
    length = max(len(values) for values in known)
    rows = torch.zeros(len(known), length, dtype=torch.float64)
    for row, values in zip(rows, known, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float64).square()
    curves = rows.cumsum(1).clamp_max(1.0)  # (weights, length); a shorter spectrum keeps its last value
    low, middle, high = (torch.quantile(curves, share, dim=0).tolist() for share in (0.1, 0.5, 0.9))
    ranks = [rank for rank in chosen if rank is not None]
    return {
        "rank": list(range(1, length + 1)),
        "median": [_round_figure(value) for value in middle],
        "low": [_round_figure(value) for value in low],
        "high": [_round_figure(value) for value in high],
        "chosen": [min(ranks), max(ranks)] if ranks else None,
        "weights": len(known),
    }


def histogram(scales: Sequence[Tensor]) -> dict[str, Any] | None:
    """Return a histogram of the row scales of all weights, symmetric around 1.

    The outermost bins also count the smallest and the largest 0.5 % of the values.
    """
    if not scales:
        return None
    values = torch.cat([scale.reshape(-1).to(torch.float64) for scale in scales])
    ordered = values.sort().values
    tail = int(0.005 * len(ordered))
    half_width = max(float((ordered[tail] - 1).abs()), float((ordered[-1 - tail] - 1).abs()), 1e-9)
    edges = torch.linspace(1 - half_width, 1 + half_width, BINS + 1, dtype=torch.float64)
    inside = values.clamp(float(edges[0]), float(edges[-1]))
    counts = torch.histogram(inside, edges).hist
    return {
        "edges": [_round_figure(float(edge)) for edge in edges],
        "counts": [int(count) for count in counts],
        "rows": len(values),
        "least": _round_figure(float(ordered[0])),
        "largest": _round_figure(float(ordered[-1])),
        "deviation": _round_figure(float((values - 1).square().mean().sqrt())),
    }


def worst(modules: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the weights with the largest relative error, in descending order."""
    known = [entry for entry in modules if entry.get("relative_error") is not None]
    return [entry["name"] for entry in sorted(known, key=lambda entry: -entry["relative_error"])[:WORST]]


def _sizes(
    folder: Path, checkpoint: Checkpoint | None, manifest: Mapping[str, Any] | None, opened: Adapter | None
) -> dict[str, int]:
    sizes = {}
    if checkpoint is not None:
        sizes["base"] = (checkpoint.stored or checkpoint).nbytes  # as stored on disk, quantised or not
    if manifest is not None:
        for entry in adapters_of(manifest):
            source = Path(str(entry.get("path", "")))
            weights = source / "adapter_model.safetensors"
            if weights.is_file():
                sizes[f"adapter {entry['name']}"] = sum(ref.nbytes for ref in read_weights(weights).tensors)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        preimage = sum(path.stat().st_size for path in files if path.relative_to(folder).parts[0] == PREIMAGE_FOLDER)
        sizes[str(manifest["artefact"])] = sum(path.stat().st_size for path in files) - preimage
        sizes |= {"pre-image": preimage} if preimage else {}
    elif opened is not None:
        sizes["adapter"] = opened.nbytes
    return sizes


def _describe_base(checkpoint: Checkpoint | None, opened: Adapter | None) -> dict[str, Any]:
    name = opened.base_name if opened is not None else None
    if checkpoint is None:
        return {"name": name}
    return {"name": name or checkpoint.folder.name, "fingerprint": checkpoint.fingerprint}


def _describe_adapter(opened: Adapter) -> dict[str, Any]:
    return {
        "name": opened.folder.resolve().name,
        "format": opened.format,
        "method": opened.method,
        "modules": len(opened.modules),
        "parameters": opened.parameters,
    }


def _round_figure(value: float | None) -> float | None:
    """Round to 6 significant digits; None for NaN and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
