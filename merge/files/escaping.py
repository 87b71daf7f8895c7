"""Escaping of names and settings from files and paths, for Markdown, for code blocks in it and for a terminal.

Names with control characters, line ends or marks of text direction are refused where they are read; all other
characters are kept. YAML and JSON are written by their libraries, shell words by shlex.quote.
"""

from __future__ import annotations

import re
from pathlib import Path

from adapter_merge.errors import AdapterMergeError, Problem

# Control characters, line and paragraph separators, and marks of direction (Unicode, "Bidirectional Algorithm").
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def has_controls(text: str) -> bool:
    """Return True for text with a control character, which would end a line or control a terminal."""
    return CONTROLS.search(text) is not None


def control_problems(names: dict[str, str]) -> list[Problem]:
    """Return a problem for each of `names` (name -> description) that holds a control character."""
    return [
        Problem(f"{description} {ascii(name)[:200]} holds a control character", expected="one line of printable text")
        for name, description in names.items()
        if has_controls(name)
    ]


def require_printable(path: Path, kind: type[AdapterMergeError]) -> None:
    """Raise `kind` for a path with a control character, since cards, manifests and terminals show paths."""
    if has_controls(str(path)):
        raise kind(
            f"{str(path)!a}: its name holds a control character",
            expected="one line of printable text",
            hint="rename it",
        )


def terminal_text(text: str) -> str:
    """Return `text` for a terminal: line ends and tabs are kept, other control characters become Python escapes."""
    return CONTROLS.sub(lambda match: match[0] if match[0] in "\n\t" else ascii(match[0])[1:-1], text)


def plain_text(text: object) -> str:
    """Escape text for one line of Markdown, so that markup, HTML and table cells in it have no effect."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", line)


def code_fence(*texts: str) -> str:
    """Return a Markdown fence for a code block with `texts`: longer than any run of backticks in them."""
    return "`" * max(3, 1 + max(len(run) for text in texts for run in re.findall("`*", text)))
