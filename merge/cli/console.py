"""What the commands print: lines for people, one JSON object, progress, errors."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from adapter_merge.errors import AdapterMergeError
from adapter_merge.storage.escaping import terminal_text


def say(text: str, *, quiet: bool = False) -> None:
    """Print one line for people on stderr."""
    if not quiet:
        click.echo(terminal_text(text), err=True)


def emit(content: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


@contextmanager
def progress_bar(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Return a progress bar of bytes on stderr; None where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def wants_json() -> bool:
    """Return True when the command line holds --json, even where its parsing failed."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def emit_error(problems: Sequence[Mapping[str, str | None]], kind: str) -> None:
    """With --json: {"error": {cause, expected, got, hint, kind, problems}}, the first problem and all of them."""
    if wants_json():
        emit({"error": {**problems[0], "kind": kind, "problems": list(problems)}})


def report_error(error: AdapterMergeError) -> None:
    """Every problem on stderr: `error:` in red where colour is wanted, then expected, got and hint; JSON on stdout."""
    emit_error([asdict(problem) for problem in error.problems], type(error).__name__)
    for problem in error.problems:
        first, *rest = terminal_text(str(problem)).split("\n")
        red = "NO_COLOR" not in os.environ
        click.echo((click.style("error: ", fg="red", bold=True) if red else "error: ") + first, err=True)
        for line in rest:
            click.echo(line, err=True)


@contextmanager
def loading() -> Iterator[None]:
    """Import torch inside the block with the garbage collector switched off, which saves a tenth of a second."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
