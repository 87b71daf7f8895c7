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
    """Base of the tree: `problems` holds all that was found."""

    def __init__(
        self,
        cause: str | Iterable[Problem],
        *,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        if isinstance(cause, str):
            self.problems: tuple[Problem, ...] = (Problem(cause, expected, got, hint),)
        else:
            self.problems = tuple(cause)
        super().__init__("\n".join(str(problem) for problem in self.problems))


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


def raise_all(problems: list[Problem], kind: type[AdapterMergeError] = InputError) -> None:
    """Raise `kind` with all `problems`, or return when there are none."""
    if problems:
        raise kind(problems)
