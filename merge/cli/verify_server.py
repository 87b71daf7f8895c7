"""adapter-merge verify --server: compare a running server with the adapter as trained, and print the figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from adapter_merge.cli.options.inputs import Subject
from adapter_merge.cli.printing.console import emit
from adapter_merge.cli.printing.progress import working

COMPARED = {
    "prompt_logprobs": "prompts and answers, by the server's prompt_logprobs",
    "echo": "prompts and answers, by echo and logprobs",
    "generated": "answers only, since the server returns no log-probabilities of prompts",
}


def verify_running(subject: Subject, served: Mapping[str, Any], as_json: bool, quiet: bool, **settings: Any) -> None:
    """Compare a server with the adapter as trained; exit code 1 unless it passes."""
    from adapter_merge.api.verify_server import verify_server
    from adapter_merge.verification.compare_logits import PROMPTS
    from adapter_merge.verification.completions_client import ServedModel

    with working(f"verifying {served['url']}", quiet) as progress:
        progress.begin("comparing prompts", len(settings["prompts"] or PROMPTS), "prompts")
        report = verify_server(
            subject.base,
            subject.adapter,
            ServedModel(**served),
            base_kind=subject.base_kind,
            options=subject.options,
            progress=progress.advance,
            **settings,
        )
    if as_json:
        emit(report)
    else:
        _show(report)
    if not report["passed"]:
        sys.exit(1)


def _show(report: Mapping[str, Any]) -> None:
    """Print the distances, the tolerance, greedy tokens, notes, problems and the verdict."""
    measured, greedy, tolerance = report["log_probabilities"], report["greedy"], report["tolerance"]
    click.echo(f"server   {report['path']}, model {report['model']}")
    click.echo(f"compared {measured['compared']} log-probabilities of {COMPARED[report['way']]}")
    for label, key in (("adapter", "difference"), ("base", "from_base"), ("effect", "effect")):
        click.echo(f"{label:<8} {_format_distance(measured[key])}{MEANING[key]}")
    click.echo(f"allowed  {_format_distance(tolerance)}, for {report['dtype']}")
    click.echo(f"greedy   {greedy['equal']}/{greedy['total']} tokens equal")
    for note in report["notes"]:
        click.echo(f"note     {note}")
    for problem in report["problems"]:
        click.echo(f"problem  {problem}")
    click.echo(report["verdict"])


MEANING = {
    "difference": ": from the server to the adapter as trained",
    "from_base": ": from the server to the base",
    "effect": ": from the base to the adapter as trained",
}


def _format_distance(figures: Mapping[str, float | None]) -> str:
    """Return the largest and the mean difference of log-probabilities as text."""
    worst, mean = (("inf" if value is None else f"{value:.3g}") for value in (figures["max"], figures["mean"]))
    return f"max |d log p| {worst}, mean {mean}"
