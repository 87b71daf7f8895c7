"""Text of other people in our texts: names and settings from files and paths, escaped for where they are written.

Names that could not be shown as they are (control characters, line ends, marks that turn the direction of text) are
refused where they are read; everything else keeps its letters and is escaped here, for Markdown, for code in it and for
a terminal. YAML and JSON are written by their libraries, shell words by shlex.quote.
"""

from __future__ import annotations

import re
from pathlib import Path

from adapter_merge.errors import AdapterMergeError, Problem

# Control characters, line and paragraph separators, and marks of direction (Unicode, "Bidirectional Algorithm").
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def has_controls(text: str) -> bool:
    """Return True for text that could not be shown as it is: it would end a line, or steer a terminal."""
    return CONTROLS.search(text) is not None


def control_problems(names: dict[str, str]) -> list[Problem]:
    """Return a problem for each of `names` (what it is, by name) that holds a control character."""
    return [
        Problem(f"{what} {ascii(name)[:200]} holds a control character", expected="one line of printable text")
        for name, what in names.items()
        if has_controls(name)
    ]


def require_printable(path: Path, kind: type[AdapterMergeError]) -> None:
    """Raise `kind` for a path that holds a control character: cards, manifests and terminals show it."""
    if has_controls(str(path)):
        raise kind(
            f"{str(path)!a}: its name holds a control character",
            expected="one line of printable text",
            hint="rename it",
        )


def terminal_text(text: str) -> str:
    """Return `text` for a terminal: its lines stay, other control characters are written as Python writes them."""
    return CONTROLS.sub(lambda match: match[0] if match[0] in "\n\t" else ascii(match[0])[1:-1], text)


def plain_text(text: object) -> str:
    """Escape text for one line of Markdown, so that markup, HTML and table cells in it have no effect."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", line)


def code_fence(*texts: str) -> str:
    """Return a Markdown fence for a code block with `texts`: longer than any run of backticks in them."""
    return "`" * max(3, 1 + max(len(run) for text in texts for run in re.findall("`*", text)))
