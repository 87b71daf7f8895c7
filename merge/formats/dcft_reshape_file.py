"""DCFT files of the reshape form (github youseefmoemen/DCFT): B, A, deconv.weight and deconv.bias of each module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adapter_merge.errors import AdapterError, Problem, raise_all
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat
from adapter_merge.methods.dcft_reshape import DcftReshapeModule
from adapter_merge.storage.checkpoint import Checkpoint, read_weights
from adapter_merge.storage.safetensors_header import TensorRef

from .dcft_tensors import images_fit
from .state_dict import SortedTensors, sort_tensors

ROLES = {"B": "B", "A": "A", "deconv.weight": "C", "deconv.bias": "bias", "base_layer": "W"}


def read_dcft_reshape(file: Path, base: Checkpoint | None) -> Adapter:
    """Read the adapter in a state dict of the reshape form. Raises AdapterError with every problem."""
    tensors = sort_tensors(read_weights(file).tensors, ROLES, base)
    modules, problems = _modules(tensors, file)
    raise_all(problems + tensors.problems, AdapterError)
    return Adapter(
        folder=file.parent,
        format=AdapterFormat.DCFT_RESHAPE,
        method="DCFT",
        modules=modules,
        replacements=tensors.replacements,
        config={},
        files=(file,),
        notes=tensors.notes,
    )


def read_reshaped(
    refs: Iterable[TensorRef], prefix: str, weights: Path
) -> tuple[tuple[AdaptedModule, ...], dict[str, TensorRef], list[Problem]]:
    """Return modules, replacements and problems of the tensors `refs` of an adapter-merge folder."""
    unknown = [ref for ref in refs if not ref.name.startswith(prefix)]
    problems = [Problem(f"{weights}: unknown tensor {r.name!r}", expected=f"a name under {prefix}") for r in unknown]
    inside = [replace(ref, name=ref.name.removeprefix(prefix)) for ref in refs if ref.name.startswith(prefix)]
    tensors = sort_tensors(inside, ROLES, None)
    modules, more = _modules(tensors, weights)
    return modules, tensors.others, problems + more


def _modules(tensors: SortedTensors, file: Path) -> tuple[tuple[AdaptedModule, ...], list[Problem]]:
    """Return one module per group of tensors, and the problems."""
    modules: list[AdaptedModule] = []
    problems: list[Problem] = []
    for name, group in sorted(tensors.groups.items()):
        if not {"A", "B", "C"} & group.keys():
            continue
        a, b, c, bias = (group.get(role) for role in ("A", "B", "C", "bias"))
        if (
            a is None
            or b is None
            or c is None
            or not images_fit(_transpose(b.shape), _transpose(a.shape), c.shape)
            or (bias is not None and bias.shape != (1,))
        ):
            problems.append(
                Problem(
                    f"{file}: the tensors of {name} do not fit",
                    "B (in/d, k), A (k, out/d), deconv.weight (1, 1, d, d), deconv.bias (1,)",
                    ", ".join(f"{role} {ref.shape}" for role, ref in group.items()),
                )
            )
        else:
            modules.append(DcftReshapeModule(name, b, a, c, bias))
    if not modules and not problems:
        problems.append(Problem(f"{file}: holds no DCFT tensors (B, A, deconv.weight)"))
    return tuple(modules), problems


def _transpose(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with its last two sizes exchanged."""
    return (*shape[:-2], *shape[:-3:-1])
