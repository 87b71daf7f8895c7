"""A cache of transposed parts: GPTQ and AWQ store weights transposed, and rows are read block by block."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BYTES = 64 << 20
KEPT_ENTRIES = 2  # kept whatever their size: two workers may read two neighbouring weights


class TransposedCache:
    """Transposed parts of the weights that were used last, shared by the threads of a job.

    Holds at most `KEPT_BYTES`, but always the `KEPT_ENTRIES` weights that were used last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(self, key: Hashable, transpose: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the parts of `key`. The first thread that asks computes them with `transpose`; others wait."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            if entry.parts is None:
                entry.parts = transpose()
                entry.nbytes = sum(part.numel() * part.element_size() for part in entry.parts)
            parts = entry.parts
        with self._lock:
            while len(self._entries) > KEPT_ENTRIES and self._nbytes() > KEPT_BYTES:
                self._entries.popitem(last=False)
        return parts

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())


class _Entry:
    """The parts of one weight; None before they are computed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.parts: tuple[Tensor, ...] | None = None
        self.nbytes = 0
