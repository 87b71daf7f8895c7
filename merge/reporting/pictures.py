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
from adapter_merge.files.installation import install_command

from .drawings import Inks, delta_values, energy, errors, heat_map, parity, retention, row_scales, sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Inks("#010203", "#020304", "#030405", "#040506", "#050607", "#060708")  # placeholders for --ink, --muted, ...
PAPER = Inks("#1b1f24", "#5f6873", "#d9dee4", "#1f6fb4", "#c9540a", "#eef0f3")


@dataclass(frozen=True)
class Picture:
    """One picture: where it stands on the page, what it is called, and whether there is anything to draw."""

    draw: Callable[[Figure, Mapping[str, Any], Inks], None]
    part: str  # acts, lost or costs
    caption: str
    drawable: Callable[[Mapping[str, Any]], bool]


PICTURES: Mapping[str, Picture] = {
    "change": Picture(
        heat_map, "acts", "Size of the change by layer and module", lambda content: bool(delta_values(content))
    ),
    "row-scale": Picture(
        row_scales,
        "acts",
        "The row scales around 1: what a plain LoRA cannot carry",
        lambda content: content["row_scale"] is not None,
    ),
    "error": Picture(
        errors,
        "lost",
        "Relative error of the factors, weight by weight",
        lambda content: any(entry.get("relative_error") for entry in content["modules"]),
    ),
    "retention": Picture(
        retention,
        "lost",
        "What quantising again has kept of the change",
        lambda content: any(entry.get("retention") is not None for entry in content["modules"]),
    ),
    "energy": Picture(
        energy,
        "lost",
        "How much of the change a rank keeps: the median weight, and the middle 80 % of all weights",
        lambda content: content["energy_curve"] is not None,
    ),
    "parity": Picture(
        parity,
        "lost",
        "Logits against the adapter as trained (line: what passes; diamond: what the adapter itself moves)",
        lambda content: any(line.get("max_dlogit") is not None for line in content["parity"]),
    ),
    "size": Picture(sizes, "costs", "Sizes on disk", lambda content: len(content["sizes"]) > 1),
}


@contextmanager
def _style(salt: str, inks: Inks) -> Iterator[None]:
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
    """The names of the pictures that this content has data for."""
    return [name for name, picture in PICTURES.items() if picture.drawable(content)]


def caption(name: str) -> str:
    """One line under a picture."""
    return PICTURES[name].caption


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
    PICTURES[name].draw(figure, content, inks)
    return figure
