"""Grouping of problems: those that differ only in names and numbers become one, with a count and examples."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adapter_merge.errors import Problem

EXAMPLES = 3
SMALLEST = 3  # number of similar problems from which on they are grouped
NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")  # a tensor or module path: at least one dot
NUMBER = re.compile(r"\d+")


def group_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Return `problems` with each group of similar problems as one problem, in the order of first appearance."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((_placeholder_form(problem.cause), _placeholder_form(problem.hint or "")), []).append(problem)
    shown: list[Problem] = []
    for group in kinds.values():
        shown += [_summarise(group)] if len(group) >= SMALLEST else group
    return shown


def _summarise(group: Sequence[Problem]) -> Problem:
    """Return one problem for a group of similar ones."""
    names = list(dict.fromkeys(match[0] for problem in group if (match := NAME.search(problem.cause))))
    cause = f"{len(group)} times: {group[0].cause}"
    if len(names) > 1:
        form = NAME.sub("…", group[0].cause, count=1).removeprefix("…: ")
        cause = f"{len(group)} times: {form}: {_join_examples(names)}"
    return Problem(
        cause,
        _join_examples([problem.expected for problem in group]) or None,
        _join_examples([problem.got for problem in group]) or None,
        group[0].hint,
    )


def _placeholder_form(text: str) -> str:
    """Return the text with names and numbers replaced by placeholders, which is equal for similar problems."""
    return NUMBER.sub("0", NAME.sub("…", text))


def _join_examples(values: Sequence[str | None]) -> str:
    """Return the first distinct values, and "..." where there are more."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return ", ".join(distinct[:EXAMPLES]) + (", ..." if len(distinct) > EXAMPLES else "")
