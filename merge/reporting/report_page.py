"""The report as one HTML file without scripts or network access, for light and dark themes and all screen sizes."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from adapter_merge.outputs.staging import disk_errors

from .drawings import LABELLED, size_text
from .pictures import PICTURES, available, caption, svg, write_png
from .verdict import percent

STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --page: #ffffff; --card: #f7f8fa; --ink: #1b1f24; --muted: #5f6873; --line: #d9dee4; --first: #1f6fb4;
  --second: #c9540a; --empty: #eef0f3; --good: #1a7f37; --bad: #c9302c; --loss: #9a6700; --none: #5f6873; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1a2027; --ink: #e8ebef; --muted: #9aa5b1;
  --line: #333c47; --first: #5aa9e6; --second: #f0883e; --empty: #222932; --good: #4ac26b; --bad: #ff7b72;
  --loss: #e3b341; --none: #9aa5b1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: clamp(1rem, 3vw, 2.5rem); max-width: 84rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 var(--font); }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.15; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
p.lead { margin: 0 0 1.2rem; color: var(--muted); max-width: 60rem; overflow-wrap: anywhere; }
.verdict { border-left: .4rem solid var(--none); background: var(--card); border-radius: .5rem; padding: .9rem 1.1rem;
  margin: 0 0 1.2rem; overflow-wrap: anywhere; }
.verdict strong { display: block; font-size: clamp(1.15rem, 3vw, 1.5rem); line-height: 1.25; }
.verdict.good, .verdict.bad { color: var(--ink); }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict.loss { border-color: var(--loss); }
.verdict.good strong { color: var(--good); } .verdict.bad strong { color: var(--bad); }
.verdict.loss strong { color: var(--loss); }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); margin: 0; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { color: var(--muted); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tiles small { display: block; font-size: .75rem; color: var(--muted); line-height: 1.3; }
.pictures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 38rem; background: var(--card); border-radius: .5rem;
  padding: .9rem; break-inside: avoid; min-width: 0; }
figure ol { margin: .6rem 0 0; padding-left: 1.4rem; font-size: .82rem; color: var(--second); overflow-wrap: anywhere; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
td.n, th.n { text-align: right; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
code { font-size: .85em; overflow-wrap: anywhere; white-space: normal; }
footer { margin-top: 2.5rem; color: var(--muted); font-size: .82rem; }
@media print { details { display: none; } }
"""
ARTEFACT_NAMES = {
    "factors": "Factors",
    "merged model": "Merged model",
    "deltas": "Dense deltas",
    "adapter": "Adapter",
    "ONNX model": "ONNX export",
}
PARTS = {"acts": "Where the adapter acts", "lost": "What is lost", "costs": "Sizes"}


def page(content: Mapping[str, Any]) -> str:
    """Return the page as HTML, made from the report's JSON only: verdict, changes, losses, sizes, tables."""
    title = html.escape(str(content["title"]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · adapter-merge</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">{_lead(content)}</p>
{_verdict(content["verdict"])}
<dl class="tiles">{_tiles(content)}</dl>
</header>
<main>
{"".join(_part(part, content) for part in PARTS)}
{_parity(content)}
{_weights(content)}
{_provenance(content)}
</main>
<footer>{_footer(content)}</footer>
</body>
</html>
"""


def _verdict(verdict: Mapping[str, str]) -> str:
    level = verdict["level"] if verdict["level"] in ("good", "bad", "loss") else "none"
    title, detail = html.escape(verdict["title"]), html.escape(verdict["detail"])
    return f'<div class="verdict {level}"><strong>{title}</strong>{detail}</div>'


def _part(part: str, content: Mapping[str, Any]) -> str:
    """Return the heading and the pictures of one part of the page; empty where the part has no picture."""
    names = [name for name in available(content) if PICTURES[name].part == part]
    title = PARTS[part]
    if part == "lost" and content["artefact"] == "adapter" and not content["parity"]:
        title = "What a plain LoRA would keep"
    figures = "\n".join(
        f"<figure><figcaption>{html.escape(caption(name))}</figcaption>{svg(name, content)}"
        f"{_worst(content) if name == 'error' else ''}</figure>"
        for name in names
    )
    return f'<h2>{title}</h2>\n<div class="pictures">\n{figures}\n</div>\n' if names else ""


def _worst(content: Mapping[str, Any]) -> str:
    """Return the list of the weights with the largest errors, with the numbers of the picture."""
    known = [entry for entry in content["modules"] if entry.get("relative_error")]
    worst = sorted(known, key=lambda entry: -entry["relative_error"])[:LABELLED]
    lines = "".join(f"<li>{html.escape(entry['name'])} {_number(entry['relative_error'])}</li>" for entry in worst)
    return f"<ol>{lines}</ol>"


def write_page(content: Mapping[str, Any], file: Path) -> None:
    """Write the page to `file` by renaming a complete temporary file. Raises OutputError where that fails."""
    text = page(content)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


def write_pictures(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every picture that the report has data for as a PNG in `folder`; return the files' paths."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name in available(content):
            files.append(folder / f"{name}.png")
            write_png(name, content, files[-1])
    return files


def _lead(content: Mapping[str, Any]) -> str:
    """Return the sentence under the title: kind of artefact, adapters and base."""
    kind = ARTEFACT_NAMES.get(str(content["artefact"]), str(content["artefact"]))
    if content["artefact"] == "factors":
        kind = "Exact factors" if content.get("exact") else "Truncated factors"
        kind += " with row scales" if content.get("form") == "lora+row_scale" else ""
    methods = ", ".join(
        f"{entry['method']} adapter {entry['name']}" if entry.get("method") else f"adapter {entry['name']}"
        for entry in content["adapters"]
    )
    base = (content.get("base") or {}).get("name")
    text = f"{kind} of the {methods}" if content["artefact"] != "adapter" else f"The {methods}"
    return html.escape(f"{text}, on {base}." if base else f"{text}.")


def _tiles(content: Mapping[str, Any]) -> str:
    """Return the boxes with the main figures."""
    tiles: list[tuple[str, str, str]] = []
    certificate = content.get("certificate") or {}
    modules = content["modules"]
    ranks = [entry["rank"] for entry in modules if entry.get("rank") is not None]
    if modules:
        tiles.append(("weights", str(len(modules)), "adapted"))
    if ranks:
        span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        tiles.append(("rank", span, ""))
    for entry in content["adapters"]:
        if entry.get("parameters") is not None:
            tiles.append(("trained parameters", f"{entry['parameters']:,}", size_text(content["sizes"]["adapter"])))
    for key, name, note in (
        ("changed", "elements changed", "median of the weights"),
        ("lost", "lost by rounding", "of the change; median of the weights"),
    ):
        shares = [entry[key] for entry in modules if entry.get(key) is not None]
        if shares and "retention" not in certificate:
            tiles.append((name, percent(median(shares)), note))
    if certificate.get("retention") is not None:
        least = f"smallest {certificate['worst_retention']:.2f}"
        tiles.append(("change kept", percent(certificate["retention"]), f"quantised again; {least}"))
    if "max_relative_error" in certificate:
        tiles.append(
            (
                "largest relative error",
                f"{certificate['max_relative_error']:.2g}",
                f"of ΔW; mean {certificate['mean_relative_error']:.2g}",
            )
        )
        tiles.append(("energy kept", percent(certificate["mean_energy"]), "mean over the weights"))
    if certificate.get("mean_output_error") is not None:
        tiles.append(
            ("error at the output", f"{certificate['mean_output_error']:.2g}", "mean, on the calibration text")
        )
    end = certificate.get("end_to_end")
    if end:
        tiles.append(("largest |Δlogit|", f"{end['max_dlogit']:.2g}", f"mean {end['mean_dlogit']:.2g}"))
        tiles.append(("KL per token", f"{end['mean_kl']:.2g}", "nats, mean"))
        tiles.append(("greedy tokens equal", f"{end['greedy_equal']}/{end['greedy_total']}", f"{end['texts']} texts"))
        if end.get("perplexity"):
            values = end["perplexity"]
            tiles.append(("perplexity", f"{values['factors']:.2f}", f"as trained {values['trained']:.2f}"))
    scale = content.get("row_scale")
    if scale:
        tiles.append(("row scales", f"±{scale['deviation']:.2g}", f"{scale['least']:.3g} to {scale['largest']:.3g}"))
    if content.get("seconds") is not None:
        tiles.append(("time", f"{content['seconds']:.1f} s", "to compute it"))
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in tiles
    )


def _parity(content: Mapping[str, Any]) -> str:
    """Return the table of comparisons with the adapter as trained; empty where there is none."""
    if not content["parity"]:
        return ""
    rows = []
    for line in content["parity"]:
        passed = line.get("passed")
        mark = (
            "–" if passed is None else f'<span class="{"good" if passed else "bad"}">{"yes" if passed else "no"}</span>'
        )
        total = line.get("greedy_total")
        greedy = "–" if total is None or line.get("greedy_equal") is None else f"{line['greedy_equal']} / {total}"
        weight_error = _number(line.get("weight_error"))
        rows.append(
            f"<tr><td>{html.escape(str(line['label']))}{'' if line['about'] else ' (another folder)'}</td>"
            f"<td>{mark}</td><td class=n>{_number(line.get('max_dlogit'))}</td>"
            f"<td class=n>{_number(line.get('bar'))}</td><td class=n>{greedy}</td><td class=n>{weight_error}</td>"
            f"<td class=n>{_number(line.get('effect'))}</td></tr>"
        )
    head = (
        "<tr><th>compared</th><th>passed</th><th class=n>max |Δlogit|</th><th class=n>tolerance</th>"
        "<th class=n>greedy tokens equal</th><th class=n>worst weight</th><th class=n>effect</th></tr>"
    )
    note = (
        "<p>max |Δlogit| and worst weight (relative error of ΔW): the artefact compared with the adapter as trained; "
        "effect: max |Δlogit| between the adapter as trained and its base.</p>"
    )
    table = f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"
    return f"<h2>Compared with the adapter as trained</h2>{table}{note}"


def _weights(content: Mapping[str, Any]) -> str:
    """Return the table of all weights, with the columns that have values."""
    columns = [
        (key, name)
        for key, name in (
            ("rank", "rank"),
            ("relative_delta", "|ΔW| / |W|"),
            ("relative_error", "relative error"),
            ("spectral_error", "spectral error"),
            ("energy", "energy"),
            ("output_error", "output error"),
            ("rounding", "rounding"),
            ("retention", "retention"),
        )
        if any(entry.get(key) is not None for entry in content["modules"])
    ]
    head = "<th>weight</th><th>shape</th>" + "".join(f"<th class=n>{name}</th>" for _, name in columns)
    rows = []
    for entry in content["modules"]:
        shape = " × ".join(str(size) for size in entry.get("shape") or ())
        cells = "".join(
            f"<td class=n>{entry[key] if key == 'rank' else _number(entry.get(key))}</td>"
            if entry.get(key) is not None
            else "<td class=n>–</td>"
            for key, _ in columns
        )
        rows.append(f"<tr><td>{html.escape(entry['name'])}</td><td>{shape}</td>{cells}</tr>")
    return (
        f"<h2>Weights</h2><details><summary>All {len(rows)} weights</summary>"
        f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div></details>"
    )


def _provenance(content: Mapping[str, Any]) -> str:
    """Return the table of inputs and versions; empty where the manifest holds none."""
    rows = []
    base = content.get("base") or {}
    for name, value in (
        ("base", base.get("name")),
        ("base fingerprint", base.get("fingerprint")),
        ("evidence of the base", content.get("origin")),
        *((f"adapter {entry['name']}", entry.get("sha256")) for entry in content["adapters"]),
        ("created", content.get("created")),
        ("versions", ", ".join(f"{key} {value}" for key, value in (content.get("versions") or {}).items())),
        ("calibration text", (content.get("calibration") or {}).get("sha256")),
    ):
        if value:
            rows.append(f"<tr><th>{html.escape(name)}</th><td><code>{html.escape(str(value))}</code></td></tr>")
    return f"<h2>Where it comes from</h2><div class=scroll><table>{''.join(rows)}</table></div>" if rows else ""


def _footer(content: Mapping[str, Any]) -> str:
    return "Drawn by adapter-merge report from the JSON that <code>adapter-merge report --json</code> prints."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
