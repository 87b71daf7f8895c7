"""Printing of text lines, JSON objects, log lines and errors."""

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

from .problem_groups import group_problems
from .progress import printing

LEVELS = ("debug", "info", "warning", "error")
LOGGER = "adapter_merge"


def say(text: str, *, quiet: bool = False) -> None:
    """Print one line of text on stderr."""
    if not quiet:
        with printing():
            click.echo(terminal_text(text), err=True)


def emit(content: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def set_log_level(level: str | None) -> None:
    """Print the library's log lines of this level and above on stderr; None: warnings and errors."""
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.levelname.lower()}: {record.getMessage()}")

    logger = logging.getLogger(LOGGER)
    logger.handlers = [Lines()]
    logger.propagate = False
    logger.setLevel((level or "warning").upper())


def is_verbose() -> bool:
    """Return True with -v or a log level below warning."""
    import logging

    return logging.getLogger(LOGGER).isEnabledFor(logging.INFO)


def set_color(choice: str) -> None:
    """Set whether this process and its libraries print colour, by the variables NO_COLOR and FORCE_COLOR."""
    for name in ("NO_COLOR", "FORCE_COLOR") if choice != "auto" else ():
        os.environ.pop(name, None)
    if choice != "auto":
        os.environ["FORCE_COLOR" if choice == "always" else "NO_COLOR"] = "1"


def wants_json() -> bool:
    """Return True when the command line holds --json, even where its parsing failed."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def report_error(error: AdapterMergeError, kind: str | None = None) -> None:
    """Print an error as text on stderr, and with --json also as an object on stdout.

    The object is {"error": {cause, expected, got, hint, kind, problems}}, with the conclusion (or else the first
    problem) and all problems. On stderr, similar problems are group_problems; -v shows all of them.
    """
    if wants_json():
        first = error.conclusion or error.problems[0]
        problems = [asdict(problem) for problem in error.problems]
        emit({"error": {**asdict(first), "kind": kind or type(error).__name__, "problems": problems}})
    whole = is_verbose()
    shown = list(error.problems) if whole else group_problems(error.problems)
    if error.conclusion is not None:
        shown.insert(0, error.conclusion)
    for problem in shown:
        _show_problem(problem)
    if not whole and len(error.problems) > len(shown):
        click.echo(f"  -v or --json shows all {len(error.problems)} problems", err=True)


def _show_problem(problem: Problem) -> None:
    cause, *details = terminal_text(str(problem)).split("\n")
    forced = "FORCE_COLOR" in os.environ
    label = "error: " if "NO_COLOR" in os.environ else click.style("error: ", fg="red", bold=True)
    click.echo(label + cause, err=True, color=True if forced else None)
    for line in details:
        click.echo(line, err=True)


@contextmanager
def loading() -> Iterator[None]:
    """Switch the garbage collector off inside the block, so that importing torch is a tenth of a second faster."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
