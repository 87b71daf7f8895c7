"""Operating system errors of input files, as errors that name the file and differ from errors of the output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_merge.errors import AdapterMergeError, FileFormatError, InputError

from .escaping import require_printable


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a FileFormatError that names `file`."""
    try:
        yield
    except OSError as error:
        raise FileFormatError(
            f"{file}: cannot be read ({error.strerror or error})",
            hint="check that it is there, its permissions and its disk",
        ) from error


def require_utf8(path: Path, kind: type[AdapterMergeError] = InputError) -> None:
    """Raise `kind` for a path that manifests and model cards could not state: not UTF-8, or with control characters."""
    require_printable(path, kind)
    for text in (str(path.absolute()), str(path.resolve())):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise kind(
                f"{os.fsencode(path)!r}: its name is not UTF-8",
                expected="names in UTF-8, which manifests are written in",
                got=repr(os.fsencode(text)),
                hint="rename it, or choose a UTF-8 locale such as LC_ALL=C.UTF-8 if the name is right",
            ) from error
