"""What there is to say of an artefact or an adapter, as one JSON object; every picture of the report is drawn from it.

modules         per weight: layer, kind, shape, rank, |dW| / |W|, errors
energy_curve    cumulative energy of dW against the rank: median and the middle 80 % of the weights
row_scale       histogram of the row scales of DoRA and DuDe
parity          weights and logits against the adapter as trained, wherever that was verified
verdict         what is known of the artefact, in one sentence
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
from adapter_merge.formats.read_options import ReadOptions
from adapter_merge.methods.adapter import Adapter
from adapter_merge.outputs.leftovers import PREIMAGE_FOLDER
from adapter_merge.outputs.staging import MANIFEST, read_manifest
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import CANDIDATES, Checkpoint, read_weights, resolve
from adapter_merge.storage.tensor_io import read_tensor

from .delta_figures import measure_deltas
from .module_grid import cell_of
from .parity_lines import parity_lines
from .verdict import verdict

BINS = 61
CURVE_RANK = 32  # how far the spectrum of a row-scaled delta is followed
WORST = 5


@dataclass(frozen=True)
class ModuleFigures:
    """What is measured of one weight where no manifest says it."""

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
    """The report's content. `base` is found through the manifest when it is not given and still lies where it lay.

    parity: files with what `adapter-merge verify --json` printed. Raises AdapterMergeError.
    """
    folder = resolve(target)
    manifest = read_manifest(folder)
    checkpoint = _base_of(base, manifest)
    modules: dict[str, dict[str, Any]] = {}
    figures: dict[str, ModuleFigures] = {}
    opened: Adapter | None = None
    origin: str | None = None
    if (folder / "adapter_config.json").is_file() or manifest is None:
        opened = open_adapter(folder, options, checkpoint)
        checkpoint = checkpoint or opened.own_base
        bound = None
        if checkpoint is not None:
            bound = bind_checked(opened, checkpoint, base_kind or _stated_kind(manifest))
            origin = bound.origin.text
        figures = measure_adapter(opened, bound)
        for name, figure in figures.items():
            modules[name] = {
                "shape": list(figure.shape),
                "rank": figure.rank,
                "delta_norm": _short(figure.delta_norm),
                "relative_delta": _short(figure.relative_delta),
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
            f"{target}: the change of none of its {len(opened.modules)} weights is known without the base",
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


def changes(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> dict[str, float]:
    """|dW| / |W| by module name, or |dW| without a base: what `inspect --heat-map` draws."""
    checkpoint = open_base(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    checkpoint = checkpoint or opened.own_base
    measured = measure_adapter(opened, bind_checked(opened, checkpoint, base_kind) if checkpoint is not None else None)
    if checkpoint is None:
        return {name: figures.delta_norm for name, figures in measured.items()}
    return {name: figures.relative_delta or 0.0 for name, figures in measured.items()}


def _stated_kind(manifest: Mapping[str, Any] | None) -> str | None:
    """Factors act on the original; any other adapter's base is told by evidence."""
    return "original" if manifest and manifest["artefact"] == "factors" else None


def _base_of(base: str | Path | None, manifest: Mapping[str, Any] | None) -> Checkpoint | None:
    if base is not None:
        return open_base(base)
    stated = ((manifest or {}).get("base") or {}).get("path")
    if stated and any((Path(stated) / name).is_file() for name in CANDIDATES):
        checkpoint = open_base(stated)
        if checkpoint.fingerprint == (manifest or {})["base"].get("fingerprint"):
            return checkpoint
    return None


def measure_adapter(opened: Adapter, bound: BoundAdapter | None) -> dict[str, ModuleFigures]:
    """Figures of every weight of an adapter, with |dW| / |W| where the base is there.

    Without a base, weights whose delta cannot be known without it are left out. `inspect` draws its heat map from this.
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
    try:
        work = Factoriser(module, weight, torch.device("cpu"))
        spectrum = work.spectrum(min(CURVE_RANK, *module.shape))
    except AdapterMergeError:  # a bias, a form of its own: nothing that a weight's figures could be taken of
        return None
    norm = math.sqrt(spectrum.total)
    size = math.sqrt(work.delta.base_total) if weight is not None else None
    values = tuple(math.sqrt(float(square)) / norm if norm else 0.0 for square in spectrum.squares[:SPECTRUM_LENGTH])
    return ModuleFigures(
        module.shape,
        module.rank,
        norm,
        None if size is None else relative(norm, size),
        values,
        work.delta.scale if weight is not None and work.scaled else None,
    )


def energy_curve(spectra: Sequence[Sequence[float]], chosen: Sequence[int | None]) -> dict[str, Any] | None:
    """Cumulative energy against rank, over all weights whose spectrum is known; None when there is none.

    spectra: singular values relative to the Frobenius norm of dW, in falling order.
    """
    known = [values for values in spectra if values]
    if not known:
        return None
    length = max(len(values) for values in known)
    rows = torch.zeros(len(known), length, dtype=torch.float64)
    for row, values in zip(rows, known, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float64).square()
    curves = rows.cumsum(1).clamp_max(1.0)  # (weights, length); a spectrum that ends stays where it ended
    low, middle, high = (torch.quantile(curves, share, dim=0).tolist() for share in (0.1, 0.5, 0.9))
    ranks = [rank for rank in chosen if rank is not None]
    return {
        "rank": list(range(1, length + 1)),
        "median": [_short(value) for value in middle],
        "low": [_short(value) for value in low],
        "high": [_short(value) for value in high],
        "chosen": [min(ranks), max(ranks)] if ranks else None,
        "weights": len(known),
    }


def histogram(scales: Sequence[Tensor]) -> dict[str, Any] | None:
    """The row scales of all weights around 1; the outermost bins take the last half percent on either side."""
    if not scales:
        return None
    values = torch.cat([scale.reshape(-1).to(torch.float64) for scale in scales])
    ordered = values.sort().values
    cut = int(0.005 * len(ordered))
    reach = max(float((ordered[cut] - 1).abs()), float((ordered[-1 - cut] - 1).abs()), 1e-9)
    edges = torch.linspace(1 - reach, 1 + reach, BINS + 1, dtype=torch.float64)
    inside = values.clamp(float(edges[0]), float(edges[-1]))
    counts = torch.histogram(inside, edges).hist
    return {
        "edges": [_short(float(edge)) for edge in edges],
        "counts": [int(count) for count in counts],
        "rows": len(values),
        "least": _short(float(ordered[0])),
        "largest": _short(float(ordered[-1])),
        "deviation": _short(float((values - 1).square().mean().sqrt())),
    }


def worst(modules: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the weights with the largest relative error, the worst first."""
    known = [entry for entry in modules if entry.get("relative_error") is not None]
    return [entry["name"] for entry in sorted(known, key=lambda entry: -entry["relative_error"])[:WORST]]


def _sizes(
    folder: Path, checkpoint: Checkpoint | None, manifest: Mapping[str, Any] | None, opened: Adapter | None
) -> dict[str, int]:
    sizes = {}
    if checkpoint is not None:
        sizes["base"] = (checkpoint.stored or checkpoint).nbytes  # as it lies on disk, quantised or not
    if manifest is not None:
        for entry in adapters_of(manifest):
            source = Path(str(entry.get("path", "")))
            weights = source / "adapter_model.safetensors"
            if weights.is_file():
                sizes[f"adapter {entry['name']}"] = sum(ref.nbytes for ref in read_weights(weights).tensors)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        kept = sum(path.stat().st_size for path in files if path.relative_to(folder).parts[0] == PREIMAGE_FOLDER)
        sizes[str(manifest["artefact"])] = sum(path.stat().st_size for path in files) - kept
        sizes |= {"pre-image": kept} if kept else {}
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


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
