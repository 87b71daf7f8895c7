"""An exported encoder in onnxruntime: logits or hidden states of texts, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import InputError
from adapter_merge.export.graph.adapter_file import SUFFIX, load_tensors
from adapter_merge.export.graph.targets import Layout, read_layout

from .providers import graph_file, open_session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Classifier:
    """An open encoder export. The caller chooses an adapter per call, or per text in a batched export."""

    def __init__(self, folder: Path, device: str = "cpu", threads: int | None = None) -> None:
        self.folder = folder
        file = graph_file(folder)
        self.session = open_session(file, device, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.layout: Layout = read_layout(metadata, str(file))
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        self._loaded: dict[str, Any] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the available adapters."""
        if self.layout.mode == "batched":
            return self.layout.adapters
        return tuple(sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}")))

    def run(
        self,
        input_ids: NDArray[np.int64],  # (batch, sequence)
        attention_mask: NDArray[np.int64],  # (batch, sequence)
        adapter: str | Sequence[str | None] | None = None,  # batched exports: one name per text
        token_type_ids: NDArray[np.int64] | None = None,  # (batch, sequence); None: zeros
    ) -> dict[str, NDArray[np.float32]]:
        """Return output name -> values: (batch, labels or width), (batch, sequence, ...) or (batch, sequence).

        Raises InputError for an unknown adapter.
        """
        import numpy as np

        feeds: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "token_type_ids" in self.inputs:
            feeds["token_type_ids"] = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        if self.layout.mode == "batched":
            names = [adapter] * len(input_ids) if adapter is None or isinstance(adapter, str) else list(adapter)
            feeds["adapter_ids"] = np.asarray([self._number(name) for name in names], np.int64)
        elif isinstance(adapter, str):
            feeds |= {name: value.numpy() for name, value in self._load(adapter).items()}
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))

    def _number(self, name: str | None) -> int:
        if name is not None and name not in self.adapters:
            raise InputError(f"{self.folder}: no adapter named {name!r}", expected=", ".join(self.adapters) or "none")
        return 0 if name is None else 1 + self.adapters.index(name)

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._loaded:
            if name not in self.adapters:
                expected = ", ".join(self.adapters) or "none"
                raise InputError(f"{self.folder}: no adapter named {name!r}", expected=expected)
            self.load_file(name, self.folder / f"{name}{SUFFIX}")
        tensors: dict[str, Any] = self._loaded[name]
        return tensors

    def load_file(self, name: str, file: Path) -> None:
        """Load the adapter in `file` under `name`."""
        self._loaded[name] = load_tensors(file, self.layout)
