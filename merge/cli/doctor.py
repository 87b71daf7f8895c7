"""adapter-merge doctor: versions, devices, and the commands that work on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.printing.console import emit


@command()
@option("--clean", type=click.Path(path_type=Path), metavar="DIR", help="Remove the leftovers of killed runs in DIR.")
@report_options
def doctor(clean: Path | None, as_json: bool, quiet: bool) -> None:
    """Show versions, devices, and the commands that work on this machine. Exit code 1 where a problem is found.

    --clean DIR removes the lock files and staging folders of killed runs from a folder of outputs or the serving cache,
    including finished shards of killed merges. Parts of a split merge (--shards) are kept.
    """
    from .environment import examine

    if clean is not None:
        _clean(clean, as_json)
        return

    report = examine()
    if as_json:
        emit(report)
    else:
        click.echo(f"python {report['python']} on {report['platform']}")
        click.echo(f"{report['cpus']} CPUs, {report['memory_gb']} GB memory, {report['disk_free_gb']} GB free here")
        click.echo(f"devices: {', '.join(report['devices'])}")
        if report["providers"]:
            click.echo(f"ONNX Runtime providers: {', '.join(report['providers'])}")
        for name, version in report["versions"].items():
            click.echo(f"  {name:<24} {version or '-'}")
        for name, state in report["works"].items():
            click.echo(f"{name}: {state}")
        for problem in report["problems"]:
            click.echo(f"problem: {problem['cause']}\n  hint: {problem['hint']}")
    if report["problems"]:
        sys.exit(1)


def _clean(folder: Path, as_json: bool) -> None:
    """Remove the leftovers of killed runs in `folder`, and print what was removed and what was kept."""
    from adapter_merge.outputs.leftovers import clear_folder

    leftovers = clear_folder(folder)
    if as_json:
        emit({"leftovers": [asdict(item) | {"path": str(item.path)} for item in leftovers]})
        return
    for item in leftovers:
        click.echo(
            f"kept {item.path}: {item.kept}" if item.kept else f"removed {item.path} ({item.nbytes / 1e6:.1f} MB)"
        )
    if not leftovers:
        click.echo(f"{folder}: no leftovers of killed runs")
