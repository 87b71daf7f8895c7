"""The result of a command that writes a folder: a few lines for people, or its manifest as JSON."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .console import emit, say

if TYPE_CHECKING:
    from adapter_merge.api.results import Written


def show_result(result: Written, output: str, started: float, as_json: bool, quiet: bool) -> None:
    """Print the result as JSON, or as a few lines for people; warnings go to stderr."""
    content = result.as_json()
    noted = [f"{entry['name']}: {note}" for entry in content["adapters"] for note in entry.get("notes", ())]
    for warning in (*content.get("warnings", ()), *content.get("notes", ()), *noted):
        say(f"warning: {warning}", quiet=quiet)
    for note in (content.get("base") or {}).get("notes", ()):
        say(f"note: {note}", quiet=quiet)
    if as_json:
        emit(content)
        return
    adapters = ", ".join(
        f"{entry['name']} ({entry['method']}, {entry['modules']} weights)" for entry in content["adapters"]
    )
    if content.get("dry_run"):
        planned = f", {content['bytes'] / 1e6:.1f} MB" if "bytes" in content else ""
        click.echo(f"would write {output}: {content['artefact']} from {adapters}{planned}")
        return
    size = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    click.echo(f"{output}: {content['artefact']} from {adapters}; {size / 1e6:.1f} MB in {seconds:.1f} s")
    kept = content.get("certificate", {}).get("retention")
    if kept is not None:
        certificate = content["certificate"]
        click.echo(
            f"  quantised again: {certificate['weights']} weights keep {kept:.2f} of the adapter's change (least "
            f"{certificate['worst_retention']:.2f}, {certificate['worst_weight']}); "
            f"error {certificate['relative_error']:.2f} of it"
        )
        if (found := certificate.get("texts")) is not None:
            click.echo(
                f"  on {found['texts']} texts ({found['tokens']} tokens): KL to the unmerged adapter {found['kl']:.3g} "
                f"nats a token (of the base without it: {found['kl_base']:.3g}); the same choice of a token in "
                f"{found['same_choice']:.0%}"
            )
    for entry in content["adapters"]:
        if entry.get("evidence"):
            click.echo(f"  base taken as the {entry['base_kind']}: {entry['evidence']}")
        if entry.get("origin"):
            click.echo(f"  base: {entry['origin']}")
        for cause in entry.get("contradictions", ()):
            say(f"warning: forced: {cause}", quiet=quiet)
