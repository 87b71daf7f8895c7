"""Every error that this project raises on purpose.

    AdapterMergeError
    ├── InputError              a file or folder that cannot be used
    │   ├── FileFormatError     truncated, lying or malicious file
    │   ├── AdapterError        an adapter that is incomplete or inconsistent
    │   └── MismatchError       adapter and base do not belong together
    ├── OutputError             the output exists, or cannot be written
    ├── UnsupportedError        known, but nothing here can do it exactly
    ├── MissingDependencyError  an optional package is not installed
    ├── NumericsError           NaN or infinity would be written
    └── ParityError             the artefact does not compute what was trained

An error carries one or more `Problem`s, so that a user sees everything that is wrong at once.
Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 20  # problems in the text of an error


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `cause` always; what was expected, what was got and the way out where known."""

    cause: str
    expected: str | None = None
    got: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        lines = [self.cause]
        for label, text in (("expected", self.expected), ("got", self.got), ("hint", self.hint)):
            if text is not None:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class AdapterMergeError(Exception):
    """Base of the tree: `problems` holds all that was found, `conclusion` what follows from many of one kind.

    The text of the error shows the conclusion and the first 20 problems.
    """

    def __init__(
        self,
        cause: str | Iterable[Problem],
        *,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
        conclusion: Problem | None = None,
    ) -> None:
        self.conclusion = conclusion
        if isinstance(cause, str):
            self.problems: tuple[Problem, ...] = (Problem(cause, expected, got, hint),)
        else:
            self.problems = tuple(cause)
        shown = [str(problem) for problem in self.problems[:SHOWN]]
        if conclusion is not None:
            shown.insert(0, str(conclusion))
        if len(self.problems) > SHOWN:
            shown.append(f"... and {len(self.problems) - SHOWN} more")
        super().__init__("\n".join(shown))


class InputError(AdapterMergeError):
    """A file or folder that cannot be used."""


class FileFormatError(InputError):
    """A truncated, lying or malicious file."""


class AdapterError(InputError):
    """An adapter that is incomplete or inconsistent."""


class MismatchError(InputError):
    """Adapter and base do not belong together."""


class OutputError(AdapterMergeError):
    """The output exists already, or cannot be written."""


class UnsupportedError(AdapterMergeError):
    """A known thing that nothing here can do exactly."""


class MissingDependencyError(AdapterMergeError):
    """An optional package is not installed."""


class NumericsError(AdapterMergeError):
    """NaN or infinity would be written."""


class ParityError(AdapterMergeError):
    """An artefact does not compute what the adapter was trained to compute."""


def raise_all(
    problems: list[Problem], kind: type[AdapterMergeError] = InputError, conclusion: Problem | None = None
) -> None:
    """Raise `kind` with all `problems` and what follows from them, or return when there are none."""
    if problems:
        raise kind(problems, conclusion=conclusion)
