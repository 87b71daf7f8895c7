"""Drawing of the report's pictures: each function draws one picture of the report's JSON on a matplotlib figure.

The axis of bars is linear and starts at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .module_grid import grid_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Inks:
    """The colours of a picture, as #rrggbb."""

    ink: str  # text
    muted: str  # labels and reference lines
    line: str  # axes and grid
    first: str  # data
    second: str  # marked values
    empty: str  # cells without a value


WIDTH = 4.8  # inches: keeps text readable on a phone
LABELLED = 5  # number of the largest errors that are numbered


def draw_heat_map(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw |dW| / |W| of every weight on a logarithmic colour scale: a column per layer, a row per kind of module."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = delta_values(content)
    grid = grid_of(values)
    layers, kinds = grid.layers, grid.kinds
    figure.set_size_inches(WIDTH, 1.35 + 0.24 * len(kinds))
    table = np.full((len(kinds), len(layers)), np.nan)
    for value, cell in zip(values.values(), grid.cells, strict=True):
        table[kinds.index(cell.kind), layers.index(cell.layer)] = value
    positive = table[np.isfinite(table) & (table > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1e-3, 1e-2)
    if high <= low * 1.0001:
        low, high = low * 0.9, high * 1.1
    axes = figure.add_subplot()
    axes.set_facecolor(inks.empty)
    mesh = axes.pcolormesh(
        np.arange(len(layers) + 1), np.arange(len(kinds) + 1), np.clip(np.ma.masked_invalid(table), low, high),
        cmap=colormaps["viridis"].resampled(24), norm=LogNorm(low, high), edgecolors="face", linewidth=0.4,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [grid.short(kind) for kind in kinds])
    step = max(1, -(-len(layers) // 12))
    marks = list(range(0, len(layers), step))
    axes.set_xticks([mark + 0.5 for mark in marks], [_layer_name(layers[mark]) for mark in marks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", aspect=38, pad=0.02, fraction=0.08, shrink=0.9)
    bar.outline.set_visible(False)
    _set_decimal_ticks(bar.ax.xaxis, low, high)
    bar.set_label(_delta_label(content))


def delta_values(content: Mapping[str, Any]) -> dict[str, float]:
    """Return |dW| / |W| by module name, or |dW| where no weight's |W| is known."""
    key = "relative_delta" if any(e.get("relative_delta") is not None for e in content["modules"]) else "delta_norm"
    return {entry["name"]: entry[key] for entry in content["modules"] if entry.get(key) is not None}


def _delta_label(content: Mapping[str, Any]) -> str:
    if all(entry.get("relative_delta") is None for entry in content["modules"]):
        return "size of the change, |ΔW| (no base was given)"
    sampled = any((entry.get("sampled") or 1) < 1 for entry in content["modules"])
    return "size of the change, |ΔW| / |W|" + (", on a sample of rows" if sampled else "")


def _layer_name(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def _set_decimal_ticks(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis with 3 to 7 decimal numbers."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    marks = [base * 10.0**power for power in range(-12, 13) for base in (1, 2, 5) if low <= base * 10.0**power <= high]
    if len(marks) > 6:
        marks = [mark for mark in marks if f"{mark:e}"[0] == "1"]
    while len(marks) > 7:
        marks = marks[::2]
    if len(marks) < 3:
        marks = list(np.geomspace(low, high, 3))
    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{float(f'{value:.2g}'):g}"))


def draw_energy(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw the energy of dW that each rank keeps (median weight and middle 80 %), and the ranks that were chosen."""
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(WIDTH, 2.7)
    curve = content["energy_curve"]
    axes = figure.add_subplot()
    ranks = [0, *curve["rank"]]
    axes.fill_between(ranks, [0, *curve["low"]], [0, *curve["high"]], color=inks.first, alpha=0.2, linewidth=0)
    axes.plot(ranks, [0, *curve["median"]], color=inks.first, linewidth=1.8)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(0, max(ranks))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y")
    axes.set_xlabel("rank")
    axes.set_ylabel("energy of ΔW kept")
    if curve["chosen"]:
        low, high = curve["chosen"]
        end = max(ranks)
        if low <= end:
            if low != high:
                axes.axvspan(low, min(high, end), color=inks.second, alpha=0.12, linewidth=0)
            axes.axvline(low, color=inks.second, linewidth=1.4)
            text = f"rank {low}" if low == high else f"ranks {low} to {high}"
            text += ", without the row scales" if content["row_scale"] else ""
            side = low > end / 2
            axes.annotate(
                text, (low, 0.06), (-5 if side else 5, 0), textcoords="offset points", color=inks.second,
                ha="right" if side else "left",
            )  # fmt: skip


def draw_errors(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw the relative error of every weight by layer; the five largest have the numbers of the page's list."""
    figure.set_size_inches(WIDTH, 2.7)
    axes = figure.add_subplot()
    known = [entry for entry in content["modules"] if entry.get("relative_error")]
    across = _set_layer_axis(axes, [entry["name"] for entry in known])
    values = [entry["relative_error"] for entry in known]
    axes.scatter(across, values, s=9, color=inks.first, linewidth=0)
    low, high = min(values), max(values)
    if high > 1e-3:  # truncated factors
        axes.set_ylim(0, high * 1.15)
    else:  # exact factors: rounding errors of float32, shown by their order of magnitude
        axes.set_yscale("log")
        axes.set_ylim(low / 2, high * 2)
        _set_decimal_ticks(axes.yaxis, low / 2, high * 2)
    axes.grid(axis="y")
    axes.set_ylabel("relative error of ΔW")
    order = sorted(range(len(known)), key=lambda index: -values[index])[:LABELLED]
    axes.scatter([across[i] for i in order], [values[i] for i in order], s=20, color=inks.second, linewidth=0)
    right_end = axes.get_xlim()[1]
    for number, index in enumerate(order, 1):
        right = across[index] < 0.9 * right_end
        axes.annotate(
            str(number), (across[index], values[index]), (4 if right else -4, 1), textcoords="offset points",
            color=inks.second, fontsize=9, ha="left" if right else "right",
        )  # fmt: skip


def draw_retention(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw the share of the change that each requantised weight keeps, and the smallest share that passes."""
    figure.set_size_inches(WIDTH, 2.7)
    axes = figure.add_subplot()
    known = [entry for entry in content["modules"] if entry.get("retention") is not None]
    values = [entry["retention"] for entry in known]
    axes.scatter(_set_layer_axis(axes, [entry["name"] for entry in known]), values, s=9, color=inks.first, linewidth=0)
    axes.axhline(1, color=inks.muted, linewidth=1)
    least = (content.get("certificate") or {}).get("min_retention")
    if least is not None:
        axes.axhline(least, color=inks.second, linewidth=1.4)
        axes.annotate(
            "smallest that passes, all weights together", (0, least), (2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=inks.second, fontsize=9,
        )  # fmt: skip
    axes.set_ylim(min(0, *values), max(1.15, max(values) * 1.05))
    axes.grid(axis="y")
    axes.set_ylabel("share of ΔW kept")


def _set_layer_axis(axes: Any, names: list[str]) -> list[float]:
    """Label the x axis with layers; return the x position of each weight, with the kinds of a layer side by side."""
    grid = grid_of(names)
    layers = {layer: index for index, layer in enumerate(grid.layers)}
    kinds = {kind: index for index, kind in enumerate(grid.kinds)}
    spread = 0.7 / max(1, len(kinds))
    step = max(1, -(-len(grid.layers) // 12))
    marks = list(range(0, len(grid.layers), step))
    axes.set_xticks(marks, [_layer_name(grid.layers[mark]) for mark in marks])
    axes.set_xlim(-0.8, len(grid.layers) - 0.2)
    axes.set_xlabel("layer")
    return [layers[cell.layer] + spread * (kinds[cell.kind] - (len(kinds) - 1) / 2) for cell in grid.cells]


def draw_row_scales(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw the histogram of the row scales of DoRA or DuDe around 1."""
    figure.set_size_inches(WIDTH, 2.5)
    histogram = content["row_scale"]
    axes = figure.add_subplot()
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=inks.first, alpha=0.85)
    axes.axvline(1, color=inks.second, linewidth=1.2)
    axes.set_xlabel("row scale d = m / |W0 + BA|")
    axes.set_ylabel("rows")
    axes.grid(axis="y")
    axes.locator_params(axis="x", nbins=7)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def draw_parity(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw the largest |dlogit| between each artefact and the adapter as trained, on a logarithmic axis."""
    lines = [line for line in content["parity"] if line.get("max_dlogit") is not None]
    figure.set_size_inches(WIDTH, 1.0 + 0.34 * len(lines))
    axes = figure.add_subplot()
    values = [max(line["max_dlogit"], 1e-9) for line in lines]
    marks = [line["bar"] for line in lines if line.get("bar")]
    effects = [line["effect"] for line in lines if line.get("effect")]
    low, high = min(values + marks) / 4, max(values + marks + effects) * 4
    for place, line, value in zip(range(len(lines)), lines, values, strict=True):
        axes.plot([value], [place], marker="o", markersize=7, color=inks.first, linewidth=0)
        if line.get("bar"):
            axes.plot([line["bar"]] * 2, [place - 0.3, place + 0.3], color=inks.second, linewidth=1.8)
        if line.get("effect"):
            axes.plot([line["effect"]], [place], marker="D", markersize=5, color=inks.muted, linewidth=0)
        axes.annotate(
            f"{line['max_dlogit']:.2g}", (value, place), (0, 7), textcoords="offset points", fontsize=9, ha="center"
        )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _set_decimal_ticks(axes.xaxis, low, high)
    axes.set_yticks(range(len(lines)), [line["label"] for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.7)
    axes.grid(axis="x")
    axes.set_xlabel("largest |Δlogit|")


def draw_sizes(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Draw the sizes of base, adapter and artefact as bars."""
    bytes_by_name = content["sizes"]
    figure.set_size_inches(WIDTH, 0.9 + 0.3 * len(bytes_by_name))
    axes = figure.add_subplot()
    places = range(len(bytes_by_name))
    unit, name = (1e9, "GB") if max(bytes_by_name.values()) >= 2e9 else (1e6, "MB")
    values = [value / unit for value in bytes_by_name.values()]
    axes.barh(places, values, height=0.42, color=inks.first)
    for place, value in zip(places, bytes_by_name.values(), strict=True):
        axes.annotate(size_text(value), (value / unit, place), (5, -3), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, max(values) * 1.3 or 1)
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(places, list(bytes_by_name))
    axes.set_ylim(len(bytes_by_name) - 0.4, -0.6)
    axes.set_xlabel(name)


def size_text(size: int) -> str:
    """Format a number of bytes with its unit, for example 1935360 as "1.94 MB"."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    if size >= 1e5:
        return f"{size / 1e6:.2f} MB" if size < 1e8 else f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.1f} kB"
