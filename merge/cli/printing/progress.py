"""Progress on stderr: one line that is redrawn on a terminal, plain lines elsewhere; never silent for long.

A thread of its own draws, so that what takes long before the first weight (loading torch, reading headers) is said too.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

FIRST, REDRAW = 0.5, 0.2  # seconds on a terminal
FIRST_LINE, NEXT_LINE = 2.0, 10.0  # seconds elsewhere
SPINNER = "|/-\\"


class Progress:
    """What a command is doing: a label, and done of total bytes (or of what `unit` names) where that is known."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self.stream, self.terminal = stream, stream.isatty()
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self.drawn = False
        self.started = time.monotonic()
        self.begin(label)

    def begin(self, label: str, total: int | None = None, unit: str = "bytes") -> None:
        """Begin a stage; `total` in `unit`, None where it is not known."""
        with self.lock:
            self.label, self.total, self.unit, self.done = label, total, unit, 0
            self.stage_started = time.monotonic()

    def advance(self, amount: int) -> None:
        """Add to what is done; any thread may call it."""
        with self.lock:
            self.done += amount

    def text(self) -> str:
        """Return the line: label, share, amount and time left, or the time that has passed."""
        with self.lock:
            passed = time.monotonic() - self.stage_started
            if not self.total or not self.done:
                return f"{self.label} ... {_clock(time.monotonic() - self.started)}"
            share = min(1.0, self.done / self.total)
            left = passed * (1 - share) / share
            return f"{self.label} {share:4.0%}  {self._amount()}  {_clock(left)} left"

    def _amount(self) -> str:
        assert self.total is not None
        if self.unit == "bytes":
            return f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        return f"{self.done} of {self.total} {self.unit}"

    def run(self) -> None:
        """Draw until `stop`; the body of the thread."""
        wait = FIRST if self.terminal else FIRST_LINE
        count = 0
        while not self.stopped.wait(wait):
            wait = REDRAW if self.terminal else NEXT_LINE
            with self.lock:
                if self.stopped.is_set():
                    return
                if self.terminal:
                    width = max(20, shutil.get_terminal_size().columns - 3)
                    self.stream.write(f"\r\x1b[K{SPINNER[count % len(SPINNER)]} {self.text()[:width]}")
                    self.drawn = True
                else:
                    self.stream.write(f"{self.text()}\n")
                self.stream.flush()
            count += 1

    def clear(self) -> None:
        """Remove the line from the terminal, before something else is printed."""
        with self.lock:
            if self.drawn:
                self.stream.write("\r\x1b[K")
                self.stream.flush()
                self.drawn = False


_shown: list[Progress] = []  # the command that is running; empty or one


@contextmanager
def working(label: str, quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr while the block runs; with `quiet` nothing is shown."""
    progress = Progress(label, sys.stderr)
    if quiet or _shown:
        yield progress
        return
    thread = threading.Thread(target=progress.run, name="progress", daemon=True)
    _shown.append(progress)
    thread.start()
    try:
        yield progress
    finally:
        progress.stopped.set()
        progress.clear()
        _shown.remove(progress)
        thread.join()


@contextmanager
def printing() -> Iterator[None]:
    """Print lines inside the block without a progress line in between."""
    if not _shown:
        yield
        return
    with _shown[0].lock:
        _shown[0].clear()
        yield


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
