"""Errors of the system while an input is read: they name the file, and are not taken for errors of the output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_merge.errors import FileFormatError


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise FileFormatError that names `file` for an OSError inside."""
    try:
        yield
    except OSError as error:
        raise FileFormatError(
            f"{file}: cannot be read ({error.strerror or error})",
            hint="check that it is there, its permissions and its disk",
        ) from error
