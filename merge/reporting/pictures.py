"""The report's pictures, drawn by matplotlib from the report's JSON: as SVG for the page, as PNG for a model card.

Inks are placeholders: in the page they become CSS variables, so that one SVG is readable by day and by night; for a PNG
they are plain colours on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import MissingDependencyError
from adapter_merge.storage.installation import install_command

from .module_grid import grid_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Inks:
    """The colours of a picture."""

    ink: str
    muted: str
    line: str
    first: str
    second: str
    empty: str


PAGE = Inks("#010203", "#020304", "#030405", "#040506", "#050607", "#060708")  # placeholders for --ink, --muted, ...
PAPER = Inks("#1b1f24", "#5f6873", "#d9dee4", "#1f6fb4", "#c9540a", "#eef0f3")
WIDTH = 5.4  # inches: text keeps a readable size on a telephone
LABELLED = 5

Picture = Callable[["Figure", Mapping[str, Any], Inks], None]


@contextmanager
def _style(salt: str, inks: Inks) -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError("the report's pictures need matplotlib", hint=install_command("report")) from None
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9.5,
        "text.color": inks.ink, "axes.labelcolor": inks.muted, "axes.edgecolor": inks.line, "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "xtick.color": inks.muted,
        "ytick.color": inks.muted, "grid.color": inks.line, "figure.facecolor": "none", "savefig.facecolor": "none",
        "axes.axisbelow": True, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def heat_map(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """|dW| / |W| of every weight, on a logarithmic scale: layers across, kinds of modules down."""
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
    _plain_ticks(bar.ax.xaxis, low, high)
    bar.set_label(_delta_label(content))


def delta_values(content: Mapping[str, Any]) -> dict[str, float]:
    """|dW| / |W| by module name, or |dW| where no base was there to compare with."""
    key = "relative_delta" if any(e.get("relative_delta") is not None for e in content["modules"]) else "delta_norm"
    return {entry["name"]: entry[key] for entry in content["modules"] if entry.get(key) is not None}


def _delta_label(content: Mapping[str, Any]) -> str:
    against = any(entry.get("relative_delta") is not None for entry in content["modules"])
    return "size of the change, |ΔW| / |W|" if against else "size of the change, |ΔW| (no base to compare with)"


def _layer_name(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """A handful of numbers on a logarithmic axis, written out."""
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


def energy(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """How much of dW a rank keeps: the median weight and the middle 80 %; the rank that was chosen."""
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


def errors(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """The relative error of every weight by layer, on a logarithmic axis; the worst five by name."""
    figure.set_size_inches(WIDTH, 3.0)
    axes = figure.add_subplot()
    known = [entry for entry in content["modules"] if entry.get("relative_error")]
    grid = grid_of(entry["name"] for entry in known)
    places = {layer: index for index, layer in enumerate(grid.layers)}
    kinds = {kind: index for index, kind in enumerate(grid.kinds)}
    spread = 0.7 / max(1, len(kinds))
    across = [places[cell.layer] + spread * (kinds[cell.kind] - (len(kinds) - 1) / 2) for cell in grid.cells]
    values = [entry["relative_error"] for entry in known]
    axes.scatter(across, values, s=9, color=inks.first, linewidth=0)
    axes.set_yscale("log")
    low, high = min(values), max(values)
    axes.set_ylim(low / 1.6, high * (high / low) ** 0.9 * 2.5)
    _plain_ticks(axes.yaxis, low / 1.6, high * 1.6)
    step = max(1, -(-len(grid.layers) // 12))
    marks = list(range(0, len(grid.layers), step))
    axes.set_xticks(marks, [_layer_name(grid.layers[mark]) for mark in marks])
    axes.set_xlim(-0.8, len(grid.layers) - 0.2)
    axes.grid(axis="y")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of ΔW")
    order = sorted(range(len(known)), key=lambda index: -values[index])[:LABELLED]
    axes.scatter([across[i] for i in order], [values[i] for i in order], s=20, color=inks.second, linewidth=0)
    lines = [f"{place}  {known[i]['name']}  {values[i]:.2g}" for place, i in enumerate(order, 1)]
    axes.text(
        0.01,
        0.99,
        "\n".join(lines),
        transform=axes.transAxes,
        va="top",
        color=inks.second,
        fontsize=7.5,
        linespacing=1.35,
    )
    for place, index in enumerate(order, 1):
        right = across[index] < 0.9 * len(grid.layers)
        axes.annotate(
            str(place), (across[index], values[index]), (4 if right else -4, 1), textcoords="offset points",
            color=inks.second, fontsize=7.5, ha="left" if right else "right",
        )  # fmt: skip


def row_scales(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """How far the row scales of DoRA or DuDe are from 1."""
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


def parity(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """The largest difference of a logit from the adapter as trained, per artefact, and its bar."""
    lines = [line for line in content["parity"] if line.get("max_dlogit") is not None]
    figure.set_size_inches(WIDTH, 1.0 + 0.34 * len(lines))
    axes = figure.add_subplot()
    values = [max(line["max_dlogit"], 1e-9) for line in lines]
    marks = [line["bar"] for line in lines if line.get("bar")]
    effects = [line["effect"] for line in lines if line.get("effect")]
    low, high = min(values + marks) / 4, max(values + marks + effects) * 4
    places = range(len(lines))
    axes.hlines(places, low, values, color=inks.first, linewidth=5)
    for place, line, value in zip(places, lines, values, strict=True):
        if line.get("bar"):
            axes.plot([line["bar"]] * 2, [place - 0.3, place + 0.3], color=inks.second, linewidth=1.8)
        if line.get("effect"):
            axes.plot([line["effect"]], [place], marker="D", markersize=4, color=inks.muted, linewidth=0)
        axes.annotate(f"{line['max_dlogit']:.2g}", (value, place), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _plain_ticks(axes.xaxis, low, high)
    axes.set_yticks(places, [line["artefact"] for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_xlabel("largest |Δlogit|")


def sizes(figure: Figure, content: Mapping[str, Any], inks: Inks) -> None:
    """Bytes of base, adapter and artefact, on a logarithmic axis."""
    bytes_by_name = content["sizes"]
    figure.set_size_inches(WIDTH, 0.9 + 0.3 * len(bytes_by_name))
    axes = figure.add_subplot()
    places = range(len(bytes_by_name))
    values = [max(1, value) / 1e6 for value in bytes_by_name.values()]
    low, high = min(values) / 5, max(values) * 12
    axes.hlines(places, low, values, color=inks.first, linewidth=8)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:,.1f} MB", (value, place), (6, -3), textcoords="offset points", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _plain_ticks(axes.xaxis, low, high)
    axes.set_yticks(places, list(bytes_by_name))
    axes.set_ylim(len(bytes_by_name) - 0.4, -0.6)
    axes.set_xlabel("MB")


# name -> the picture, its caption, and whether there is anything to draw
PICTURES: Mapping[str, tuple[Picture, str, Callable[[Mapping[str, Any]], bool]]] = {
    "change": (heat_map, "Where the adapter changes the model", lambda content: bool(delta_values(content))),
    "energy": (
        energy,
        "How much of the change a rank keeps: the median weight, and the middle 80 % of all weights",
        lambda content: content["energy_curve"] is not None,
    ),
    "error": (
        errors,
        "What the factors lose, weight by weight",
        lambda content: any(entry.get("relative_error") for entry in content["modules"]),
    ),
    "row-scale": (
        row_scales,
        "The row scales around 1: what a plain LoRA cannot carry",
        lambda content: content["row_scale"] is not None,
    ),
    "parity": (
        parity,
        "Logits against the adapter as trained (line: the bar; diamond: what the adapter itself moves)",
        lambda content: any(line.get("max_dlogit") is not None for line in content["parity"]),
    ),
    "size": (sizes, "Sizes", lambda content: len(content["sizes"]) > 1),
}


def available(content: Mapping[str, Any]) -> list[str]:
    """The names of the pictures that this content has data for."""
    return [name for name, (_, _, drawable) in PICTURES.items() if drawable(content)]


def caption(name: str) -> str:
    """One line under a picture."""
    return PICTURES[name][1]


def svg(name: str, content: Mapping[str, Any]) -> str:
    """The picture as an <svg> element whose colours are CSS variables; its ids are its own on a page of several."""
    stream = io.StringIO()
    with _style(name, PAGE):
        _drawn(name, content, PAGE).savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for variable, place in asdict(PAGE).items():
        text = text.replace(place, f"var(--{variable})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", text)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{caption(name)}" ', 1).strip()


def write_png(name: str, content: Mapping[str, Any], file: Path) -> None:
    """The picture as a PNG on white, 200 dots per inch, for a model card."""
    with _style(name, PAPER):
        _drawn(name, content, PAPER).savefig(file, format="png", dpi=200, facecolor="white")


def _drawn(name: str, content: Mapping[str, Any], inks: Inks) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    PICTURES[name][0](figure, content, inks)
    return figure
