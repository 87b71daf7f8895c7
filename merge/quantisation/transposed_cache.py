"""Packed bytes turned so that dense rows lie together, kept while the rows of a weight are read block by block."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BYTES = 64 << 20
KEPT_ENTRIES = 2  # at least, whatever their size: two workers can be at a boundary of two weights


class TurnedCache:
    """The turned parts of the weights used last, shared by the threads of a job.

    Keeps at most `KEPT_BYTES`, and always the `KEPT_ENTRIES` weights used last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(self, key: Hashable, turn: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the turned parts of `key`; the first thread that asks computes them with `turn`, others wait."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            if entry.parts is None:
                entry.parts = turn()
                entry.nbytes = sum(part.numel() * part.element_size() for part in entry.parts)
            parts = entry.parts
        with self._lock:
            while len(self._entries) > KEPT_ENTRIES and self._nbytes() > KEPT_BYTES:
                self._entries.popitem(last=False)
        return parts

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())


class _Entry:
    """Parts of one weight, or None until they are computed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.parts: tuple[Tensor, ...] | None = None
        self.nbytes = 0
