"""Trained tokens (PEFT's trainable_token_indices and TrainableTokens): the replacement of single embedding rows."""

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
    """Rows `indices` of an embedding, trained in full. PEFT names the tensor a delta; it holds the whole rows."""

    name: str
    values: TensorRef  # (n, dim)
    indices: tuple[int, ...]
    parameter: str = "weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(-1, dim): the number of rows is known from the base alone."""
        return (-1, self.values.shape[1])

    @property
    def rank(self) -> int:
        return len(self.indices)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.values,)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Raise UnsupportedError: replaced rows have no low-rank factors."""
        raise UnsupportedError(
            f"{self.name}: trained tokens are replaced rows and have no low-rank factors",
            hint="merge this adapter instead",
        )

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        """Return the replacement of the trained rows, in `dtype`."""
        return RowsReplaced(torch.tensor(self.indices, dtype=torch.int64), read(self.values).to(dtype))
