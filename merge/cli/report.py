"""adapter-merge report: write an HTML page about an adapter or an artefact."""

from __future__ import annotations

from pathlib import Path

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.stated_settings import adapter_options, read_single_stated
from adapter_merge.cli.options.values import SOURCE
from adapter_merge.cli.printing.console import emit, say
from adapter_merge.cli.printing.progress import working
from adapter_merge.errors import OutputError


@command(examples=["./merged -o report.html", "./adapter --base ./base -o report.html"])
@click.argument("target", type=SOURCE, metavar="ARTEFACT_OR_ADAPTER")
@option("-o", "--output", type=click.Path(path_type=Path), help="The HTML file to write, such as report.html.")
@option(
    "--pictures", type=click.Path(path_type=Path), help="A folder to write the pictures to as PNG, for model cards."
)
@option(
    "--base", type=SOURCE, help="The base, for |dW| / |W| and row scales; default: the base that the manifest names."
)
@option(
    "--parity",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with the output of `verify --json`; may be given several times.",
)
@option("--overwrite", is_flag=True, help="Replace an existing HTML file.")
@adapter_options
@report_options
def report(
    target: str,
    output: Path | None,
    pictures: Path | None,
    base: str | None,
    parity: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show how an artefact or an adapter changes its base, and what is lost, as one HTML file without network access.

    Without --output a heat map is printed. With --json the data of the report is printed.
    """
    if output is not None and output.is_dir():
        raise OutputError(f"{output}: is a folder", expected="a file, such as report.html")
    if output is not None and output.exists() and not overwrite:
        raise OutputError(f"{output}: exists already", hint="choose another --output, or pass --overwrite")
    base_kind, options = read_single_stated()
    with working(f"measuring {target}", quiet):
        from adapter_merge.reporting.report import gather

        content = gather(target, base, base_kind=base_kind, options=options, parity=parity)
    if output is not None:
        from adapter_merge.reporting.report_page import write_page

        write_page(content, output)
        say(f"{output}: {output.stat().st_size / 1e3:.0f} kB", quiet=quiet)
    if pictures is not None:
        from adapter_merge.reporting.report_page import write_pictures

        for file in write_pictures(content, pictures):
            say(str(file), quiet=quiet)
    if as_json:
        emit(content)
    elif output is None and pictures is None:
        from rich.console import Console

        from adapter_merge.reporting.drawings import delta_values
        from adapter_merge.reporting.heatmap import heat_table

        values = delta_values(content)
        if values:
            Console().print(heat_table(values))
        else:
            say("the manifest has no figures of single weights", quiet=quiet)
