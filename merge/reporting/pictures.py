"""The report's pictures, drawn by matplotlib from the report's JSON: SVG for the page, PNG for a model card.

The colours of an SVG are placeholders, which are replaced by CSS variables, so that one SVG fits light and dark themes.
A PNG has fixed colours on white.
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
from adapter_merge.files.installation import install_command

from .drawings import (
    Inks,
    delta_values,
    draw_energy,
    draw_errors,
    draw_heat_map,
    draw_parity,
    draw_retention,
    draw_row_scales,
    draw_sizes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Inks("#010203", "#020304", "#030405", "#040506", "#050607", "#060708")  # placeholders for --ink, --muted, ...
PAPER = Inks("#1b1f24", "#5f6873", "#d9dee4", "#1f6fb4", "#c9540a", "#eef0f3")


@dataclass(frozen=True)
class Picture:
    """One picture: how it is drawn, its part of the page, its caption, and whether the report has data for it."""

    draw: Callable[[Figure, Mapping[str, Any], Inks], None]
    part: str  # a key of report_page.PARTS
    caption: str
    drawable: Callable[[Mapping[str, Any]], bool]


PICTURES: Mapping[str, Picture] = {
    "change": Picture(
        draw_heat_map, "acts", "Size of the change by layer and module", lambda content: bool(delta_values(content))
    ),
    "row-scale": Picture(
        draw_row_scales,
        "acts",
        "Row scales: the part of the change that a plain LoRA cannot express",
        lambda content: content["row_scale"] is not None,
    ),
    "error": Picture(
        draw_errors,
        "lost",
        "Relative error of the factors of each weight",
        lambda content: any(entry.get("relative_error") for entry in content["modules"]),
    ),
    "retention": Picture(
        draw_retention,
        "lost",
        "Share of the change that is kept after quantising again",
        lambda content: any(entry.get("retention") is not None for entry in content["modules"]),
    ),
    "energy": Picture(
        draw_energy,
        "lost",
        "Energy of the change that a rank keeps: the median weight, and the middle 80 % of all weights",
        lambda content: content["energy_curve"] is not None,
    ),
    "parity": Picture(
        draw_parity,
        "lost",
        "Logits compared with the adapter as trained (line: tolerance; diamond: effect of the adapter)",
        lambda content: any(line.get("max_dlogit") is not None for line in content["parity"]),
    ),
    "size": Picture(draw_sizes, "costs", "Sizes on disk", lambda content: len(content["sizes"]) > 1),
}


@contextmanager
def _style(salt: str, inks: Inks) -> Iterator[None]:
    """Set matplotlib's style inside the `with` block. Raises MissingDependencyError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError("the report's pictures need matplotlib", hint=install_command("report")) from None
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 10,
        "text.color": inks.ink, "axes.labelcolor": inks.muted, "axes.edgecolor": inks.line, "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "xtick.color": inks.muted,
        "ytick.color": inks.muted, "grid.color": inks.line, "figure.facecolor": "none", "savefig.facecolor": "none",
        "axes.axisbelow": True, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def available(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the pictures that the report has data for."""
    return [name for name, picture in PICTURES.items() if picture.drawable(content)]


def caption(name: str) -> str:
    """Return the caption of a picture."""
    return PICTURES[name].caption


def svg(name: str, content: Mapping[str, Any]) -> str:
    """Return the picture as an <svg> element with CSS variables as colours; its ids begin with the picture's name."""
    stream = io.StringIO()
    with _style(name, PAGE):
        _draw(name, content, PAGE).savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
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
    """Write the picture as a PNG on white, 200 dots per inch."""
    with _style(name, PAPER):
        _draw(name, content, PAPER).savefig(file, format="png", dpi=200, facecolor="white")


def _draw(name: str, content: Mapping[str, Any], inks: Inks) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    PICTURES[name].draw(figure, content, inks)
    return figure
