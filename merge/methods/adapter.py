"""The interface between adapter formats, methods and the engine: `AdaptedModule` and `Adapter`.

Both are built from file headers and configs alone: building one reads no weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from adapter_merge.errors import NumericsError, Problem, raise_all
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_io import all_finite, read_tensor

from .block_edits import BlockEdit
from .canonical_form import CanonicalForm
from .residual import Initial

if TYPE_CHECKING:
    from torch import Tensor

Reader: TypeAlias = "Callable[[TensorRef], Tensor]"  # reads one stored tensor, in its stored dtype
Weight: TypeAlias = "Callable[[], Tensor]"  # reads the base weight W0 (out, in), in the base's dtype


class AdapterFormat(StrEnum):
    """The layout that an adapter was read from. The values are shown to users and written to reports."""

    PEFT = "PEFT folder"
    NATIVE = "adapter-merge folder"
    DCFT = "DCFT checkpoint"
    DCFT_RESHAPE = "DCFT, reshape form"
    MYTRANSFORMERS = "MyTransformers checkpoint"
    KOHYA = "kohya / LyCORIS file"
    GGUF = "llama.cpp LoRA"
    DIFFUSERS = "diffusers LoRA file"
    COMBINATION = "combination"  # several adapters combined by a recipe; no file has this layout


class MethodName(StrEnum):
    """The methods by which readers and commands decide. The values are shown to users and written to reports.

    `Adapter.method` also holds other texts: types of PEFT, mixtures such as "LoHa and LoRA".
    """

    LORA = "LoRA"
    RSLORA = "rsLoRA"
    DORA = "DoRA"
    PISSA = "PiSSA"
    OLORA = "OLoRA"
    MILORA = "MiLoRA"
    DUDE = "DuDe"
    DCFT = "DCFT"


class AdaptedModule(Protocol):
    """The adaptation of one weight by one method. The classes in methods/ provide it; the engine uses only this."""

    @property
    def name(self) -> str:
        """Module path in the model, for example model.layers.0.self_attn.q_proj."""

    @property
    def parameter(self) -> str:
        """Which parameter of the module is adapted: "weight", "bias", or the name of a bare parameter."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the adapted weight; (vocabulary, dim) for an embedding; -1 for a size only the base knows."""

    @property
    def rank(self) -> int:
        """An upper bound of the rank of the update before row and column scales."""

    @property
    def factor_rank(self) -> int:
        """The rank of all factors that the canonical form holds in memory: a residual's factors count too."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that the canonical form is computed from."""

    @property
    def untrained(self) -> tuple[TensorRef, ...]:
        """Those of `refs` that training leaves as they are: DCFT's ranknum, initial factors, random projections."""

    @property
    def embedding(self) -> bool:
        """True when the weight is an embedding (vocabulary, dim), adapted by the transposed product."""

    @property
    def magnitude(self) -> TensorRef | None:
        """The trained magnitude vector of DoRA and DuDe, (out,) or (in,); None where there is none."""

    @property
    def magnitude_dim(self) -> int:
        """0 for one magnitude per output row, 1 for one per input column."""

    @property
    def own_magnitude(self) -> bool:
        """True when the magnitude is computed as the norm of the frozen residual instead of being stored."""

    @property
    def initial(self) -> Initial | None:
        """The initialisation that was subtracted from the base (PiSSA, OLoRA, DuDe); None where there was none."""

    @property
    def frozen(self) -> TensorRef | None:
        """The frozen residual (out, in), where it was saved beside the factors."""

    @property
    def needs_base(self) -> bool:
        """True when `form` reads the base weight."""

    @property
    def share_count(self) -> int:
        """The number of adapters whose changes are combined in this one; 0 for a module of a single adapter."""

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype` on the CPU.

        `read` gives a stored tensor; `weight` gives W0 (out, in) in the base's dtype. Raises UnsupportedError when
        the adaptation has no canonical form, or none without the base.
        """

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        """Return the change of the stored weight, in `dtype`: the canonical form, or an edit that is not one."""


class ModuleDefaults(ABC):
    """Default values that hold for most methods, so that a method's class states only its differences.

    Properties rather than dataclass fields: a subclass may replace one by a field with a default, or by a property.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """See `AdaptedModule.rank`."""

    @property
    def factor_rank(self) -> int:
        return self.rank * (2 if self.initial is not None else 1)

    @property
    def untrained(self) -> tuple[TensorRef, ...]:
        return ()

    @property
    def parameter(self) -> str:
        return "weight"

    @property
    def embedding(self) -> bool:
        return False

    @property
    def magnitude(self) -> TensorRef | None:
        return None

    @property
    def magnitude_dim(self) -> int:
        return 0

    @property
    def own_magnitude(self) -> bool:
        return False

    @property
    def initial(self) -> Initial | None:
        return None

    @property
    def frozen(self) -> TensorRef | None:
        return None

    @property
    def needs_base(self) -> bool:
        return False

    @property
    def share_count(self) -> int:
        return 0

    @abstractmethod
    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """See `AdaptedModule.form`."""

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        return self.form(read, weight, dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files describe it: adapted modules and replaced tensors, by their names at training.

    Example:
        >>> adapter = load_adapter("adapter")
        >>> all(len(module.shape) == 2 and module.rank > 0 for module in adapter.modules)
        True
    """

    folder: Path
    format: AdapterFormat
    method: str  # a MethodName, the peft_type of a layer type, or a text such as "LoHa and LoRA"
    modules: tuple[AdaptedModule, ...]
    replacements: Mapping[str, TensorRef]  # base tensor name -> the trained tensor
    config: Mapping[str, Any]
    base_name: str | None = None
    fan_in_fan_out: bool = False
    own_base: Checkpoint | None = None  # the checkpoint itself, where it also holds the base weights (DCFT)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())
    base_layers: Mapping[str, TensorRef] = field(default_factory=dict)  # base weights saved beside the factors
    tied: bool = False  # embeddings and head shared one adapter (PEFT's ensure_weight_tying)
    prefix: str | None = None  # prefix of every module name in the base, where the user states it
    contradictions: tuple[Problem, ...] = ()  # what the user states otherwise than the files
    forced: bool = False  # the user wants it used where evidence contradicts the base or a statement
    certainty: str = "certain"  # how the format was recognised: certain, likely or stated (see formats/detection.py)
    snapshot: InputSnapshot = field(default_factory=InputSnapshot, repr=False, compare=False)  # taken before reading

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor: factors first, then replacements."""
        return tuple(ref for module in self.modules for ref in module.refs) + tuple(self.replacements.values())

    @property
    def parameters(self) -> int:
        """The number of trained values, including replacements. A tensor that several modules share counts once."""
        trained = {(ref.file, ref.name): ref for ref in self.refs}
        for module in self.modules:
            for ref in module.untrained:
                trained.pop((ref.file, ref.name), None)
        return sum(math.prod(ref.shape) for ref in trained.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(ref.nbytes for ref in self.refs)

    def check_values(self) -> None:
        """Read every tensor once. Raises NumericsError with the name of each that holds NaN or infinity."""
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
