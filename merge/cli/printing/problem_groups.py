"""Many problems as a few lines: those that differ only in names and numbers become one, with a count and examples."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adapter_merge.errors import Problem

EXAMPLES = 3
SMALLEST = 3  # problems of one kind that are worth a group
NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")  # a tensor or module path: at least one dot
NUMBER = re.compile(r"\d+")


def grouped(problems: Sequence[Problem]) -> list[Problem]:
    """Return `problems` with each large group of one kind as one problem, in the order of their first appearance."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((_form(problem.cause), _form(problem.hint or "")), []).append(problem)
    shown: list[Problem] = []
    for group in kinds.values():
        shown += [_summary(group)] if len(group) >= SMALLEST else group
    return shown


def _summary(group: Sequence[Problem]) -> Problem:
    names = list(dict.fromkeys(match[0] for problem in group if (match := NAME.search(problem.cause))))
    cause = f"{len(group)} times: {group[0].cause}"
    if len(names) > 1:
        cause = f"{len(group)} times: {NAME.sub('…', group[0].cause, count=1).removeprefix('…: ')}: {_listed(names)}"
    return Problem(
        cause,
        _listed([problem.expected for problem in group]) or None,
        _listed([problem.got for problem in group]) or None,
        group[0].hint,
    )


def _form(text: str) -> str:
    """Return the text without what differs between problems of one kind."""
    return NUMBER.sub("0", NAME.sub("…", text))


def _listed(values: Sequence[str | None]) -> str:
    """Return the first different values, and "..." where there are more."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return ", ".join(distinct[:EXAMPLES]) + (", ..." if len(distinct) > EXAMPLES else "")
