"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), AdaLoRA (2303.10512): one adapted weight.

LoRA     W' = W0 + s B A                                     s = alpha / r, or alpha / sqrt(r) for rsLoRA
DoRA     W' = diag(m / rownorm(W0 + s B A)) (W0 + s B A)     norms of the output rows, as in all implementations
AdaLoRA  W' = W0 + s B diag(E) A                             s = alpha / (r at initialisation + 1e-5)
Convolution  A (r, in, k, ...) and B (out, r, 1, ...) as matrices (r, in k ...) and (out, r); W0 as (out, in k ...)
Embedding (vocabulary, dim): W' = W0 + s (B A)^T; the norms of DoRA are then those of the columns of W0
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapter_merge.errors import UnsupportedError
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import TORCH_DTYPES

from .adapter import ModuleDefaults, Reader, Weight
from .block_edits import BlockEdit, Replaced, chain_edits
from .canonical_form import CanonicalForm, Residual
from .residual import Initial, make_residual, make_saved_residual
from .tucker import kernel_size, tucker_down

if TYPE_CHECKING:
    from torch import Tensor

ADALORA_EPSILON = 1e-5


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return s: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732, eq. 4)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True)
class LoraModule(ModuleDefaults):
    """One weight adapted by LoRA, DoRA, PiSSA, DuDe or AdaLoRA, described by file headers only."""

    name: str  # module path in the model: model.layers.0.self_attn.q_proj
    a: TensorRef  # (r, in);  embeddings: (r, vocabulary)
    b: TensorRef  # (out, r); embeddings: (dim, r)
    scale: float
    magnitude: TensorRef | None = None  # (out,), or (in,) where magnitude_dim is 1
    initial: Initial | None = None  # PiSSA, OLoRA and DuDe on the original base
    embedding: bool = False  # the weight is (vocabulary, dim) = (in, out) and is adapted by (B A)^T
    e: TensorRef | None = None  # (r, 1): AdaLoRA's singular values
    parameter: str = "weight"
    magnitude_dim: int = 0  # 1: a magnitude per input column (some LyCORIS files, early MyTransformers)
    frozen: TensorRef | None = None  # (out, in): the residual, where it was saved beside the factors
    own_magnitude: bool = False  # the magnitude is the norm of the frozen residual (MyTransformers before 83fcc6a)
    kernel: tuple[int, ...] = ()  # of an adapted convolution, whose `a` is (r, in k ...); (): a linear layer
    core: TensorRef | None = None  # (r, r, k, ...): `a` is then (r, in) (tucker.py)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight in the model; transposed for a Conv1D."""
        out, inner = self.b.shape[0], self.a.shape[1] * kernel_size(self.core)
        return (inner, out) if self.embedding else (out, inner)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        initial = self.initial.refs if self.initial is not None else ()
        optional = (self.e, self.magnitude, self.frozen, self.core)
        return (self.a, self.b, *(ref for ref in optional if ref is not None), *initial)

    @property
    def untrained(self) -> tuple[TensorRef, ...]:
        initial = self.initial.refs if self.initial is not None else ()
        return (*initial, *((self.frozen,) if self.frozen is not None else ()))

    @property
    def needs_base(self) -> bool:
        """True when the base weight must be read to compute the factors or the magnitude."""
        if self.initial is not None and (self.frozen is not None or not self.initial.refs):
            return True
        return self.own_magnitude and self.frozen is None

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the canonical form in `dtype`, on the CPU.

        Calls `weight`, which reads W0 (out, in) in the base's dtype, only for a residual or a computed magnitude.
        Raises MismatchError where a saved residual does not belong to this base, UnsupportedError where an
        initialisation cannot be repeated.
        """
        a = read(self.a).to(dtype)  # (r, in)
        b = read(self.b).to(dtype)  # (out, r)
        if self.e is not None:
            a = a * read(self.e).to(dtype).reshape(-1, 1)
        if self.core is not None:
            a = tucker_down(read(self.core).to(dtype), a)
        if self.embedding:
            up, down = a.T.contiguous() * self.scale, b.T.contiguous()
        else:
            up, down = b * self.scale, a
        magnitude = read(self.magnitude).to(dtype).reshape(-1) if self.magnitude is not None else None
        residual: Residual | None = None
        if self.initial is not None and self.frozen is not None:
            residual = make_saved_residual(read(self.frozen), weight(), self.rank, dtype, self.name)
        elif self.initial is not None:
            residual = make_residual(self.initial, self.rank, self.scale, read, weight, dtype)
        if self.own_magnitude:
            frozen = read(self.frozen).to(dtype) if self.frozen is not None else None
            if frozen is None:
                frozen = weight().to(dtype)
                if residual is not None:
                    frozen = residual.rows_(frozen, slice(None)).to(dtype)
            magnitude = torch.linalg.vector_norm(frozen, dim=1 - self.magnitude_dim)
        dim = 1 if self.embedding else self.magnitude_dim
        return CanonicalForm(up, down, magnitude=magnitude, magnitude_dim=dim, residual=residual)

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        """Return the change of the stored weight in `dtype`; a saved residual replaces the base weight first."""
        if self.frozen is None:
            return self.form(read, weight, dtype)
        return chain_edits((Replaced(self.frozen), replace(self, initial=None).form(read, weight, dtype)))


@dataclass(frozen=True)
class BiasModule(ModuleDefaults):
    """One bias changed by a trained vector (PEFT's lora_bias): bias' = bias + s b."""

    name: str
    vector: TensorRef  # (out,)
    scale: float
    parameter: str = "bias"

    @property
    def shape(self) -> tuple[int, int]:
        """(1, out): the bias counts as a matrix of one row."""
        return (1, self.vector.shape[0])

    @property
    def rank(self) -> int:
        return 1

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.vector,)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Raise UnsupportedError: low-rank factors act on weights, not on biases."""
        raise UnsupportedError(
            f"{self.name}.bias: a trained bias inside lora_B has no low-rank form", hint="merge this adapter instead"
        )

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        """Return the addition of s b as a product of rank one."""
        return CanonicalForm(torch.full((1, 1), self.scale, dtype=dtype), read(self.vector).to(dtype)[None])


@dataclass(frozen=True)
class RowSliceModule(ModuleDefaults):
    """Rows start .. stop of an adapted weight, for a base that stores a fused weight (q, k, v) as several."""

    whole: LoraModule
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def shape(self) -> tuple[int, int]:
        return (self.stop - self.start, self.whole.shape[1])

    @property
    def rank(self) -> int:
        return self.whole.rank

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return self.whole.refs

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return rows start .. stop of the whole module's form; norms are per row, so they stay valid."""
        form = self.whole.form(read, weight, dtype)
        rows = slice(self.start, self.stop)
        magnitude = form.magnitude[rows] if form.magnitude is not None else None
        return CanonicalForm(form.up[rows].contiguous(), form.down, magnitude=magnitude)


class ExpertUps:
    """B (out, r E) of a stacked parameter: read once for all E experts, released after the last expert has taken its B.

    The expert is the fastest index of B, so the values of each expert are spread over the whole tensor.
    """

    def __init__(self, b: TensorRef, experts: int, uses: int = 1) -> None:
        self.b, self.experts, self.uses = b, experts, uses
        self._lock = threading.Lock()
        self._by_expert: Tensor | None = None  # (E, out, r)
        self._uses_left = 0

    def take(self, read: Reader, index: int) -> Tensor:
        """Return B (out, r) of expert `index`, in the stored dtype. May be called by several threads."""
        with self._lock:
            if self._by_expert is None:
                stacked = read(self.b)
                self._by_expert = stacked.reshape(stacked.shape[0], -1, self.experts).permute(2, 0, 1).contiguous()
                self._uses_left = self.uses
            b = self._by_expert[index].clone()
            self._uses_left -= 1
            if self._uses_left <= 0:
                self._by_expert = None
            return b


@dataclass(frozen=True)
class ExpertModule(ModuleDefaults):
    """One expert of a stacked parameter (PEFT's target_parameters on (experts, out, in)).

    PEFT concatenates the factors of the experts: A is (experts * r, in), expert by expert; B is (out, r * experts) with
    the expert as the fastest index (ParamWrapper.get_delta_weight). This module is the block `rows`, `columns` of the
    product B A of one expert.
    """

    name: str
    a: TensorRef  # (E r, in)
    b: TensorRef  # (out, r E)
    experts: int
    index: int
    scale: float
    rows: tuple[int, int]
    columns: tuple[int, int]
    ups: ExpertUps = field(compare=False, repr=False)  # of `b`, shared by all experts
    target: str = ""  # the stacked parameter
    turned: bool = False  # the parameter's experts are B A transposed

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.a, self.b)

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the factors of this expert. Does not read the base."""
        item = TORCH_DTYPES[self.a.dtype].itemsize
        size = self.rank * self.a.shape[1] * item
        start = self.a.start + self.index * size
        expert_a = replace(self.a, shape=(self.rank, self.a.shape[1]), start=start, stop=start + size)
        down = read(expert_a)[:, slice(*self.columns)].to(dtype).contiguous()
        up = self.ups.take(read, self.index)[slice(*self.rows)].to(dtype).contiguous()
        return CanonicalForm(up * self.scale, down)


@dataclass(frozen=True)
class StackModule(ModuleDefaults):
    """All experts of a stacked parameter, or one bare 2-D parameter; binding decides which by the base's shapes."""

    name: str  # the module that owns the parameter
    a: TensorRef
    b: TensorRef
    targets: tuple[tuple[str, int, float], ...]  # (parameter, r, scale) that these factors may belong to
    depth: int = 0  # the number of PEFT's wrappers of the same module around this one
    wrappers: int = 1  # the number of adapted parameters of the module

    @property
    def rank(self) -> int:
        return self.targets[0][1] if self.targets else 1

    @property
    def shape(self) -> tuple[int, int]:
        return (self.b.shape[0], self.a.shape[1])

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.a, self.b)

    @property
    def needs_base(self) -> bool:
        return True

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Raise UnsupportedError: the base is needed to divide the factors among experts."""
        raise UnsupportedError(
            f"{self.name}: adapted experts need the base, whose shapes give their number", hint="give BASE as well"
        )
