"""Conversion of operating system errors of input files into errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_merge.errors import AdapterMergeError, FileFormatError, InputError

from .escaping import require_printable

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096  # Linux, limits.h: NAME_MAX, PATH_MAX


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a FileFormatError that names `file`."""
    try:
        yield
    except OSError as error:
        raise FileFormatError(
            f"{file}: cannot be read ({error.strerror or error})",
            hint="check that the file exists, its permissions and its disk",
        ) from error


def require_utf8(path: Path, kind: type[AdapterMergeError] = InputError) -> None:
    """Raise `kind` for a path that is not UTF-8, holds control characters, or is longer than Linux allows.

    Manifests and model cards, which state paths, are UTF-8.
    """
    require_printable(path, kind)
    if len(_encode(str(path))) >= MAX_PATH_BYTES or any(len(_encode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise kind(f"{str(path)[:200]} ...: the name is too long", expected=f"at most {MAX_NAME_BYTES} bytes")
    for resolved in (False, True):
        try:
            text = str(path.resolve() if resolved else path.absolute())
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise kind(
                f"{_encode(str(path))!r}: its name is not UTF-8",
                expected="names in UTF-8, which manifests are written in",
                got=repr(_encode(str(path.absolute()))),
                hint="rename it, or choose a UTF-8 locale such as LC_ALL=C.UTF-8 if the name is right",
            ) from error


def _encode(text: str) -> bytes:
    """Return the path's bytes as the file system has them; escaped where it has none."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate, from JSON
        return text.encode("utf-8", "backslashreplace")
