"""Open an adapter for a program that wants to look at it."""

from __future__ import annotations

from pathlib import Path

from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.read_options import ReadOptions
from adapter_merge.methods.adapter import Adapter
from adapter_merge.quantisation.dense_view import open_base


def load_adapter(adapter: str | Path, reading: ReadOptions | None = None, *, base: str | Path | None = None) -> Adapter:
    """Open `adapter` (a folder, file or hub id of any format) from its headers and config; no weight is read.

    reading: what the adapter's files do not say. base: for formats whose names only a base resolves (kohya), or whose
    trained heads only a base tells from its own weights (a DCFT checkpoint). Returns the adapter: its method, its
    modules with shape (out, in) and rank, its replacements. Raises AdapterError or UnsupportedError.

    Example:
        >>> load_adapter("adapter").method
        'LoRA'
    """
    return open_adapter(adapter, reading, open_base(base) if base is not None else None)
