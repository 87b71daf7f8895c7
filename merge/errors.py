"""Every error that this project raises on purpose.

    AdapterMergeError
    ├── InputError              a file or folder that cannot be used
    │   ├── FileFormatError     a file that is truncated, contradicts itself or is malicious
    │   ├── AdapterError        an adapter that is incomplete or inconsistent
    │   └── MismatchError       the adapter does not belong to the base
    ├── OutputError             the output exists, or cannot be written
    ├── UnsupportedError        a known method, format or scheme that this project cannot handle exactly
    ├── MissingDependencyError  an optional package is not installed
    ├── NumericsError           a result holds NaN or infinity
    └── ParityError             an artefact does not compute what the adapter was trained to compute

An error carries one or more `Problem`s, so that a user sees everything that is wrong at once. Any other exception that
reaches the user is a bug of this project.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 20  # problems in the text of an error


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its cause and, where known, the expected and the actual value and a hint for a fix."""

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
    """Base class of every error that this project raises on purpose.

    `problems` holds every problem of the failed call. `conclusion` states what many problems of one kind have in
    common. The text of the error shows the conclusion and the first 20 problems.

    Example:
        >>> try:
        ...     merge("no-such-folder", "adapter", "merged")
        ... except AdapterMergeError as error:
        ...     print(len(error.problems), type(error).__name__)
        1 InputError
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
    """A file or folder cannot be used."""


class FileFormatError(InputError):
    """A file is truncated, contradicts itself or is malicious."""


class AdapterError(InputError):
    """An adapter is incomplete or inconsistent."""


class MismatchError(InputError):
    """The adapter does not belong to the base: names, shapes or values differ."""


class OutputError(AdapterMergeError):
    """The output exists already, or cannot be written."""


class UnsupportedError(AdapterMergeError):
    """A method, format or scheme is known, but this project cannot handle it exactly."""


class MissingDependencyError(AdapterMergeError):
    """An optional package is not installed."""


class NumericsError(AdapterMergeError):
    """A result holds NaN or infinity, or would hold it after rounding."""


class ParityError(AdapterMergeError):
    """An artefact does not compute what the adapter was trained to compute."""


def raise_all(
    problems: list[Problem], kind: type[AdapterMergeError] = InputError, conclusion: Problem | None = None
) -> None:
    """Raise one error of `kind` with all `problems` and the `conclusion`; return where there are no problems."""
    if problems:
        raise kind(problems, conclusion=conclusion)
