"""The report as one HTML file: no network, no script, readable by day and by night, on a telephone and on a wall."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.outputs.staging import disk_errors

from .pictures import available, caption, svg, write_png

STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --page: #ffffff; --card: #f7f8fa; --ink: #1b1f24; --muted: #5f6873; --line: #d9dee4; --first: #1f6fb4;
  --second: #c9540a; --empty: #eef0f3; --good: #1a7f37; --bad: #c9302c; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1a2027; --ink: #e8ebef; --muted: #9aa5b1;
  --line: #333c47; --first: #5aa9e6; --second: #f0883e; --empty: #222932; --good: #4ac26b; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: clamp(1rem, 3vw, 2.5rem); max-width: 84rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 var(--font); }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.15; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
p.lead { margin: 0 0 1.2rem; color: var(--muted); max-width: 60rem; overflow-wrap: anywhere; }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); margin: 0; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { color: var(--muted); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tiles small { display: block; font-size: .75rem; color: var(--muted); line-height: 1.3; }
.pictures { columns: 2 30rem; column-gap: 1rem; margin-top: 1.6rem; }
figure { display: inline-block; width: 100%; margin: 0 0 1rem; background: var(--card); border-radius: .5rem;
  padding: .9rem; break-inside: avoid; }
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
METHODS = {"factors": "Factors", "merged model": "Merged model", "deltas": "Dense deltas", "adapter": "Adapter"}


def page(content: Mapping[str, Any]) -> str:
    """The whole page, from the report's JSON alone."""
    title = html.escape(str(content["title"]))
    figures = "\n".join(
        f"<figure><figcaption>{html.escape(caption(name))}</figcaption>{svg(name, content)}</figure>"
        for name in available(content)
    )
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
<dl class="tiles">{_tiles(content)}</dl>
</header>
<main>
<div class="pictures">
{figures}
</div>
{_parity(content)}
{_weights(content)}
{_provenance(content)}
</main>
<footer>{_footer(content)}</footer>
</body>
</html>
"""


def write_page(content: Mapping[str, Any], file: Path) -> None:
    """Write the page to `file`, whole or not at all. Raises OutputError."""
    text = page(content)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


def write_pictures(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every picture that there is data for as a PNG in `folder`; the files' paths."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name in available(content):
            files.append(folder / f"{name}.png")
            write_png(name, content, files[-1])
    return files


def _lead(content: Mapping[str, Any]) -> str:
    kind = METHODS.get(str(content["artefact"]), str(content["artefact"]))
    if content["artefact"] == "factors":
        kind = "Exact factors" if content.get("exact") else "Truncated factors"
        kind += " with row scales" if content.get("form") == "lora+row_scale" else ""
    methods = ", ".join(f"{entry['method']} adapter {entry['name']}" for entry in content["adapters"])
    base = (content.get("base") or {}).get("name")
    text = f"{kind} of the {methods}" if content["artefact"] != "adapter" else f"The {methods}"
    return html.escape(f"{text}, on {base}." if base else f"{text}.")


def _tiles(content: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str, str]] = []
    certificate = content.get("certificate") or {}
    modules = content["modules"]
    ranks = [entry["rank"] for entry in modules if entry.get("rank") is not None]
    tiles.append(("weights", str(len(modules)), ""))
    if ranks:
        span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        tiles.append(("rank", span, ""))
    if "max_relative_error" in certificate:
        tiles.append(
            (
                "largest relative error",
                f"{certificate['max_relative_error']:.2g}",
                f"of ΔW; mean {certificate['mean_relative_error']:.2g}",
            )
        )
        tiles.append(("energy kept", _percent(certificate["mean_energy"]), "mean over the weights"))
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
        tiles.append(("time", f"{content['seconds']:.1f} s", "to find the factors"))
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in tiles
    )


def _percent(value: float) -> str:
    """0.87919 -> 87.9 %; never 100 % for less than all."""
    if value >= 1 - 1e-9:
        return "100 %"
    return f"{100 * value:.1f} %" if value < 0.9995 else f"{100 * value:.6f}".rstrip("0") + " %"


def _parity(content: Mapping[str, Any]) -> str:
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
        rows.append(
            f"<tr><td>{html.escape(str(line['artefact']))}</td><td class=n>{_number(line.get('max_dlogit'))}</td>"
            f"<td class=n>{_number(line.get('mean_dlogit'))}</td><td class=n>{greedy}</td>"
            f"<td class=n>{_number(line.get('bar'))}</td><td>{mark}</td></tr>"
        )
    head = (
        "<tr><th>artefact</th><th class=n>max |Δlogit|</th><th class=n>mean |Δlogit|</th>"
        "<th class=n>greedy tokens equal</th><th class=n>bar</th><th>passed</th></tr>"
    )
    return f"<h2>Parity with the adapter as trained</h2><div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _weights(content: Mapping[str, Any]) -> str:
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
    rows = []
    base = content.get("base") or {}
    for name, value in (
        ("base", base.get("name")),
        ("base fingerprint", base.get("fingerprint")),
        *((f"adapter {entry['name']}", entry.get("sha256")) for entry in content["adapters"]),
        ("made", content.get("created")),
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
