"""Methods that PEFT's own layer computes: PEFT builds its layer around one weight, and the layer's `merge` gives W'.

For these methods the formula is not implemented a second time: the layer holds one weight W0 (out, in), loads the
adapter's tensors and merges in float64. The result is an edit of the whole weight. One layer is built at a time, on the
CPU, so that only one weight is in memory. Needs peft (the extra `verify`).

Types whose change has a low rank by construction (`low_rank`) have a canonical form as well: the change that the layer
merges, split into two factors. What these leave out is measured, so that a change of a higher rank is an error.

Sources: peft.get_peft_model, peft.set_peft_model_state_dict, peft.tuners.*.layer (`merge`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import AdapterError, MissingDependencyError, UnsupportedError
from adapter_merge.files.installation import install_command
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import TensorRef

from .adapter import ModuleDefaults, Reader, Weight
from .block_edits import BlockEdit, WholeReplaced
from .canonical_form import CanonicalForm

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 8  # random vectors beside those for the rank
ROUNDING = 1e-13  # of the largest singular value: smaller ones are rounding
LEFT_OUT = 1e-9  # relative norm of what exact factors may leave out of a change that float64 computes
PREFIX = "base_model.model."  # of the tensors of single modules in a PEFT folder
_layer_lock = threading.Lock()  # PEFT uses torch's global generator, and memory is for one layer
# Settings that select modules of a model; they are dropped, since the layer is built for one named module.
_MODULE_SETTINGS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
           "target_parameters", "auto_mapping", "task_type")  # fmt: skip


def require_peft(kind: str) -> None:
    """Raise MissingDependencyError where peft is not installed; `kind` is the adapter's peft_type."""
    if find_spec("peft") is None:
        raise MissingDependencyError(
            f"an adapter of type {kind} is merged by PEFT's own layer, and peft is not installed",
            hint=install_command("verify"),
        )


@dataclass(frozen=True, eq=False)
class PeftLayerModule(ModuleDefaults):
    """The weight or the bias of one layer, adapted by a method that PEFT's layer computes."""

    name: str
    kind: str  # PEFT's peft_type
    tensors: Mapping[str, TensorRef]  # by their full names in the folder, with those that all modules share
    config: Mapping[str, Any]
    changes: tuple[str, ...] = ("weight",)  # the parameters that a merge changes
    drawn: tuple[str, ...] = ()  # names of tensors that the folder may leave out, because a seed gives them
    parameter: str = "weight"
    shape: tuple[int, int] = (-1, -1)  # (out, in), or (1, out) of a bias, once bound
    partner: TensorRef | None = None  # the layer's other parameter: the bias of a weight, the weight of a bias
    companions: tuple[tuple[int, int], ...] = ()  # (out, in) of all adapted weights, for tensors that these share
    low_rank: int | None = None  # the largest rank of W' - W0; None: no bound but the weight's shape

    @property
    def rank(self) -> int:
        return min(self.shape) if self.low_rank is None else self.low_rank

    @property
    def factor_rank(self) -> int:
        """A rank whose factors take the bytes of three matrices of the weight's size."""
        rows, columns = self.shape
        return max(1, -(-3 * rows * columns // max(1, rows + columns)))

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(self.tensors.values())

    @property
    def needs_base(self) -> bool:
        return True

    def form(self, read: Reader, weight: Weight, dtype: torch.dtype) -> CanonicalForm:
        """Return the factors of the merged layer's change. Raises UnsupportedError where its rank has no low bound."""
        if self.low_rank is None:
            raise UnsupportedError(
                f"{self.name}: {self.kind} changes the weight in a way that has no exact low-rank factors",
                hint="merge this adapter, or truncate its change with --rank",
            )
        stored = weight()
        with _layer_lock, torch.no_grad():
            layer = self._build(read, stored)
            layer.merge()
            change = layer.get_base_layer().weight.detach() - stored.to(torch.float64)
        up, down, left_out = split(change, self.low_rank)
        if not left_out <= LEFT_OUT:
            raise UnsupportedError(
                f"{self.name}: this {self.kind} adapter changes the weight by more than rank {self.low_rank}",
                got=f"{left_out:.1e} of the change is left out",
                hint="merge this adapter, or truncate its change with --rank",
            )
        return CanonicalForm(up.to(dtype), down.to(dtype))

    def edit(self, read: Reader, weight: Weight, dtype: torch.dtype) -> BlockEdit:
        """Return the whole weight (out, in) or bias (1, out) after PEFT's merge in float64, rounded to `dtype`."""
        stored = weight()
        with _layer_lock, torch.no_grad():
            layer = self._build(read, stored)
            layer.merge()
            merged = getattr(layer.get_base_layer(), self.parameter).detach().reshape(self.shape)
        before = stored.reshape(self.shape)
        change = (merged - before.to(torch.float64)).to(dtype)
        return WholeReplaced(before, merged.to(dtype), change)

    def probe_layer(self, read: Reader, weight: Weight) -> Tensor:
        """Return W' (out, in), or the bias (1, out), float64, from the unmerged layer's outputs for unit vectors."""
        stored = weight()
        with _layer_lock, torch.no_grad():
            layer = self._build(read, stored)
            inner = layer.get_base_layer().weight.shape[1]
            offset: Tensor = layer(torch.zeros(1, inner, dtype=torch.float64))  # (1, out)
            if self.parameter == "bias":
                return offset
            return torch.cat(
                [
                    layer(torch.eye(inner, dtype=torch.float64)[first : first + 1024]) - offset
                    for first in range(0, inner, 1024)
                ]
            ).T.contiguous()

    def _build(self, read: Reader, stored: Tensor) -> Any:
        """Return PEFT's layer in float64 around W0 and the bias, where there is one."""
        partner = read(self.partner) if self.partner is not None else None
        matrix, bias = (partner, stored) if self.parameter == "bias" else (stored, partner)
        assert matrix is not None, "binding must set the weight beside a bias"
        require_peft(self.kind)
        from peft import get_peft_model, set_peft_model_state_dict

        other_shapes = [shape for shape in self.companions if shape != tuple(matrix.shape)]
        names = [self.name, *(f"adapter_merge_companion.{index}" for index in range(len(other_shapes)))]
        root = torch.nn.Module()
        _add_module(root, self.name, _make_linear(matrix.clone(), bias))
        for name, shape in zip(names[1:], other_shapes, strict=True):
            _add_module(root, name, _make_linear(torch.zeros(1, dtype=matrix.dtype).expand(shape), None))
        state = {key: read(ref) for key, ref in self.tensors.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(root, layer_config(self.config, names))
                result = set_peft_model_state_dict(model, state)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            ImportError,
            NotImplementedError,
        ) as error:
            raise AdapterError(
                f"{self.name}: PEFT cannot build the layer of this {self.kind} adapter",
                got=f"{type(error).__name__}: {error}"[:400],
                hint="is this the base that the adapter was trained on?",
            ) from error
        self._check_loaded(result)
        return model.get_submodule(PREFIX + self.name).eval().to(torch.float64)

    def _check_loaded(self, result: Any) -> None:
        """Raise AdapterError where a tensor of the folder was not used, or one of the layer is not in the folder."""
        shared = {key.split(".")[1] for key in self.tensors if not key.startswith(PREFIX)}
        optional = shared | set(self.drawn)
        missing = [
            key
            for key in result.missing_keys
            if key.startswith(f"{PREFIX}{self.name}.")
            and not optional & set(key.split("."))
            and not key.startswith(f"{PREFIX}{self.name}.base_layer.")
        ]
        if missing or result.unexpected_keys:
            raise AdapterError(
                f"{self.name}: the folder's tensors are not those of PEFT's {self.kind} layer",
                expected=f"also {missing[0]}" if missing else None,
                got=f"also {result.unexpected_keys[0]}" if result.unexpected_keys else None,
            )


def split(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return factors (out, R), (R, in) of a matrix of at most `rank`, R <= rank, and the relative norm of the rest.

    change: (out, in) float64. Its range is found by products with random vectors, in O(out in rank).
    """
    width = min(rank + OVERSAMPLING, *change.shape)
    random = torch.Generator().manual_seed(0)
    probes = torch.randn(change.shape[1], width, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(change @ probes).Q  # (out, width)
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    kept = max(1, int((values[:rank] > ROUNDING * values[:1]).sum()))
    root = values[:kept].sqrt()
    up, down = basis @ left[:, :kept] * root, root[:, None] * right[:kept]
    norm = torch.linalg.vector_norm(change)
    rest = torch.linalg.vector_norm(change - up @ down)
    return up, down, float(rest / norm) if norm > 0 else 0.0


def layer_config(config: Mapping[str, Any], names: list[str]) -> Any:
    """Return PEFT's config object of an adapter_config.json, for the modules `names`, whose weights are (out, in)."""
    from peft import PeftConfig

    settings = {key: value for key, value in config.items() if key not in _MODULE_SETTINGS}
    if "fan_in_fan_out" in settings:
        settings["fan_in_fan_out"] = False
    peft_config = PeftConfig.from_peft_type(**settings)
    peft_config.target_modules = set(names)
    return peft_config


def _make_linear(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    """Return a linear layer with these parameters, neither copied nor initialised."""
    out, inner = weight.shape
    layer = torch.nn.Linear(inner, out, bias=bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _add_module(root: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    """Add `layer` below `root` under a dotted path."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, layer)


def with_companions(module: PeftLayerModule, shapes: tuple[tuple[int, int], ...]) -> PeftLayerModule:
    """Return the module with the sizes of all adapted weights; they determine the size of shared tensors."""
    return replace(module, companions=shapes)
