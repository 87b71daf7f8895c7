"""adapter-merge inspect: show an adapter's method, targets and problems, and what the commands would do with it."""

from __future__ import annotations

import sys
from typing import Any

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.hub import add_revision, hub_options
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.stated_settings import adapter_options, read_single_stated
from adapter_merge.cli.options.values import SOURCE
from adapter_merge.cli.printing.console import emit, report_error


@command(examples=["./adapter", "./adapter --base ./base", "./merged"])
@click.argument("adapter", type=SOURCE)
@option("--base", type=SOURCE, help="Also check that the adapter fits this base.")
@adapter_options
@option("--heat-map", is_flag=True, help="Also read the weights, and show the size of each change by layer.")
@hub_options
@report_options
def inspect(
    adapter: str,
    base: str | None,
    heat_map: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show ADAPTER's method, targets, ranks and problems, and what the commands would do with it.

    Only headers are read, except with --heat-map. ADAPTER may also be a merged model, deltas or an ONNX export of
    adapter-merge: its inputs and options are shown.
    """
    from adapter_merge.api.inspect import inspect as run
    from adapter_merge.api.options import InspectOptions

    base = add_revision(base)
    base_kind, options = read_single_stated()
    report = run(adapter, base, InspectOptions(base_kind=base_kind, reading=options)).as_json()
    if heat_map and "method" in report and not report["problems"]:
        from adapter_merge.reporting.report import measure_changes

        report["change"] = measure_changes(adapter, base, base_kind=base_kind, options=options)
    if as_json:
        emit(report)
    elif "artefact" in report:
        _show_artefact(report)
    elif "method" in report:
        _show(report)
    if report["problems"]:
        if not as_json:
            _show_problems(report["problems"])
        sys.exit(1)


def _show_problems(problems: list[dict[str, Any]]) -> None:
    from adapter_merge.errors import AdapterMergeError, Problem

    report_error(AdapterMergeError([Problem(**problem) for problem in problems]))


def _show_artefact(report: dict[str, Any]) -> None:
    click.echo(f"{report['artefact']} of adapter-merge {report['versions'].get('adapter-merge', '')}: {report['path']}")
    click.echo(f"base        {report['base']['name']} ({report['base']['path']})")
    for entry in report["adapters"]:
        method = f"{entry['method']}, {entry['modules']} weights, " if entry["method"] else ""
        click.echo(f"adapter     {entry['name']}: {method}{entry['path']}")
    options = ", ".join(f"{key} {value}" for key, value in report["options"].items() if value not in (None, False))
    click.echo(f"options     {options}")
    preimage = f", and a pre-image of {report['preimage_bytes'] / 1e6:.1f} MB" if report["preimage_bytes"] else ""
    click.echo(f"written     {report['created']}, {report['files']} files, {report['bytes'] / 1e6:.1f} MB{preimage}")
    for warning in report["warnings"]:
        click.echo(f"warning     {warning}")
    for name, text in report["would"].items():
        click.echo(f"{name:<11} {text}")


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)  # names must not be read as markup
    size = report["bytes"]
    kind = f"{report['format']} ({report['certainty']})"
    console.print(report["method"], style="bold", end="")
    console.print(f" adapter, {kind}: {report['path']}", soft_wrap=True)
    console.print(f"base        {report['base_model'] or 'not stated'}")
    console.print(f"trained on  {report['trained_on']}", soft_wrap=True)
    size_text = f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    console.print(f"trained     {report['parameters']:,} parameters, {size_text}, {report['modules']} weights")
    table = Table(box=None, pad_edge=False)
    for column in ("target", "weights", "(out, in)", "rank"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for kind, entry in report["targets"].items():
        shapes = " ".join(str(tuple(shape)) for shape in entry["shapes"])
        table.add_row(kind, str(entry["count"]), shapes, " ".join(map(str, entry["ranks"])))
    console.print(table)
    if report.get("change"):
        from adapter_merge.reporting.heatmap import heat_table

        console.print(heat_table(report["change"], "|dW| / |W|" if "base" in report else "|dW|"))
    if report["replacements"]:
        console.print(f"replaced    {', '.join(report['replacements'][:8])}", soft_wrap=True)
    for note in report["notes"]:
        console.print(f"note        {note}", soft_wrap=True)
    for name, text in report["would"].items():
        console.print(f"{name:<11} {text}", soft_wrap=True)
    if "base" in report:
        base = report["base"]
        kind_text = f", used as the {base['kind']} base: {base['evidence']}" if base["evidence"] else ""
        console.print(f"shapes fit  {base['path']}{kind_text}", soft_wrap=True)
        console.print(f"origin      {base['origin']}", soft_wrap=True)
        for scheme, count in base["quantised"].items():
            console.print(f"quantised   {count} weights of {scheme}", soft_wrap=True)
        for note in base["notes"]:
            console.print(f"note        {note}", soft_wrap=True)
    for warning in report.get("warnings", ()):
        console.print(f"warning     {warning}", soft_wrap=True)
