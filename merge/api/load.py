"""Opening of an adapter for other programs: the function `load_adapter`."""

from __future__ import annotations

from pathlib import Path

from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.methods.adapter import Adapter
from adapter_merge.quantisation.dense_view import open_base


def load_adapter(adapter: str | Path, reading: ReadOptions | None = None, *, base: str | Path | None = None) -> Adapter:
    """Open `adapter` (a folder, file or hub id of any format) from its headers and config, without reading a weight.

    reading: settings that the adapter's files do not hold. base: needed for formats whose module names are resolved
    against the base (kohya), and to tell a DCFT checkpoint's trained heads from its base weights.
    Returns the adapter: its method, its modules with shape (out, in) and rank, and the tensors that it replaces.
    Raises InputError for a path that cannot be read, FileFormatError for a damaged file, AdapterError for an incomplete
    adapter, UnsupportedError for an unknown method.

    Example:
        >>> print(load_adapter("adapter").method)
        LoRA
    """
    return open_adapter(adapter, reading, open_base(base) if base is not None else None)
