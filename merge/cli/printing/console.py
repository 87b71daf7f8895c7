"""What the commands print: lines for people, one JSON object, log lines, errors."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from adapter_merge.errors import AdapterMergeError, Problem
from adapter_merge.files.escaping import terminal_text

from .problem_groups import grouped
from .progress import printing

LEVELS = ("debug", "info", "warning", "error")
LOGGER = "adapter_merge"


def say(text: str, *, quiet: bool = False) -> None:
    """Print one line for people on stderr."""
    if not quiet:
        with printing():
            click.echo(terminal_text(text), err=True)


def emit(content: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def set_log_level(level: str | None) -> None:
    """Send the library's log lines of this level and above to stderr; None shows warnings alone."""
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.levelname.lower()}: {record.getMessage()}")

    logger = logging.getLogger(LOGGER)
    logger.handlers = [Lines()]
    logger.propagate = False
    logger.setLevel((level or "warning").upper())


def is_verbose() -> bool:
    """Return True when -v or a log level below warning was asked for."""
    import logging

    return logging.getLogger(LOGGER).isEnabledFor(logging.INFO)


def set_color(choice: str) -> None:
    """Say for this process, and libraries that print, whether there is colour: the environment's own two variables."""
    for name in ("NO_COLOR", "FORCE_COLOR") if choice != "auto" else ():
        os.environ.pop(name, None)
    if choice != "auto":
        os.environ["FORCE_COLOR" if choice == "always" else "NO_COLOR"] = "1"


def wants_json() -> bool:
    """Return True when the command line holds --json, even where its parsing failed."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def report_error(error: AdapterMergeError, kind: str | None = None) -> None:
    """Print an error: with --json an object on stdout, always lines for people on stderr.

    {"error": {cause, expected, got, hint, kind, problems}}: the conclusion (else the first problem), and all problems.
    On stderr: the conclusion first, then problems of one kind as one; all of them with -v.
    """
    if wants_json():
        first = error.conclusion or error.problems[0]
        problems = [asdict(problem) for problem in error.problems]
        emit({"error": {**asdict(first), "kind": kind or type(error).__name__, "problems": problems}})
    whole = is_verbose()
    shown = list(error.problems) if whole else grouped(error.problems)
    if error.conclusion is not None:
        shown.insert(0, error.conclusion)
    for problem in shown:
        _show_problem(problem)
    if not whole and len(error.problems) > len(shown):
        click.echo(f"  all {len(error.problems)} problems: -v, or --json", err=True)


def _show_problem(problem: Problem) -> None:
    first, *rest = terminal_text(str(problem)).split("\n")
    forced = "FORCE_COLOR" in os.environ
    label = "error: " if "NO_COLOR" in os.environ else click.style("error: ", fg="red", bold=True)
    click.echo(label + first, err=True, color=True if forced else None)
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
