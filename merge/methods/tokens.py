"""Trained tokens: single rows of an embedding replaced (PEFT's trainable_token_indices and TrainableTokens)."""

from __future__ import annotations

from dataclasses import dataclass

from adapter_merge.errors import UnsupportedError
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .block_edits import BlockEdit, RowsReplaced
from .canonical_form import CanonicalForm


@dataclass(frozen=True)
class TokenModule(ModuleDefaults):
    """Rows `indices` of an embedding, trained in full. PEFT calls them a delta; they are the rows themselves."""

    name: str
    values: TensorRef  # (n, dim)
    indices: tuple[int, ...]
    parameter: str = "weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(-1, dim): how many rows the embedding has stands in the base."""
        return (-1, self.values.shape[1])

    @property
    def rank(self) -> int:
        return len(self.indices)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.values,)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Raises UnsupportedError: replaced rows are no factors."""
        raise UnsupportedError(
            f"{self.name}: trained tokens are replaced rows and have no low-rank factors",
            hint="merge this adapter instead",
        )

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        """The replacement of those rows."""
        return RowsReplaced(torch.tensor(self.indices, dtype=torch.int64), read(self.values).to(dtype))
