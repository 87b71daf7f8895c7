"""adapter-merge doctor: versions, devices, and what works on this machine."""

from __future__ import annotations

import sys

import click

from .console import emit
from .options import report_options


@click.command()
@report_options
def doctor(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show versions, devices, and what works on this machine; exit code 1 when something is broken."""
    from .environment import examine

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
