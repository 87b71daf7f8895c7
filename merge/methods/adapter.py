"""An adapter as its folder describes it, from headers and config only; no weight is read to make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapter_merge.errors import NumericsError, Problem, raise_all
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_io import all_finite, read_tensor

from .canonical_form import CanonicalForm

if TYPE_CHECKING:
    from torch import Tensor


class AdaptedModule(Protocol):
    """What a method's file provides for one adapted weight (lora.py, dcft.py, ...)."""

    @property
    def name(self) -> str:
        """Module path in the model."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it adapts; (vocabulary, dim) for an embedding."""

    @property
    def rank(self) -> int:
        """An upper bound of the rank of the unscaled update."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor that the form needs."""

    @property
    def needs_base(self) -> bool:
        """True when finding the form reads the base weight."""

    def form(
        self, read: Callable[[TensorRef], Tensor], weight: Callable[[], Tensor], dtype: torch.dtype
    ) -> CanonicalForm:
        """The canonical form in `dtype`; `weight` gives W0 (out, in) in the base's dtype."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: adapted modules and full replacements, by the names of the model they were trained in."""

    folder: Path
    format: str  # "PEFT folder", "adapter-merge folder", "DCFT checkpoint", ...
    method: str  # "LoRA", "rsLoRA", "DoRA", "PiSSA", "DuDe", "DCFT", ...
    modules: tuple[AdaptedModule, ...]
    replacements: Mapping[str, TensorRef]  # base tensor name -> the trained tensor
    config: Mapping[str, Any]
    base_name: str | None = None
    fan_in_fan_out: bool = False
    own_base: Checkpoint | None = None  # a checkpoint that holds its base (DCFT reference)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())
    base_layers: Mapping[str, TensorRef] = field(default_factory=dict)  # base weights saved beside the factors
    tied: bool = False  # embeddings and head were trained as one (PEFT's ensure_weight_tying)
    prefix: str | None = None  # before every name, where the user states it
    certainty: str = "certain"  # how sure the reader is of the format: certain, likely, stated

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(ref for module in self.modules for ref in module.refs) + tuple(self.replacements.values())

    @property
    def parameters(self) -> int:
        """Trained numbers, replacements included."""
        total = 0
        for ref in self.refs:
            count = 1
            for size in ref.shape:
                count *= size
            total += count
        return total

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.refs)

    def check_values(self) -> None:
        """Read every tensor once. Raises NumericsError naming each that holds NaN or infinity."""
        problems = []
        for ref in self.refs:
            if ref.dtype in FLOAT_DTYPES and not all_finite(read_tensor(ref)):
                problems.append(
                    Problem(
                        f"{ref.file}: tensor {ref.name!r} holds NaN or infinity",
                        hint="the training diverged, or the file is damaged",
                    )
                )
        raise_all(problems, NumericsError)
