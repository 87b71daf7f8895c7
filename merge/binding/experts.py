"""Adapted experts of a stacked parameter; the base stores them as one 3-D tensor, or as one 2-D tensor per expert.

The orientation of PEFT's factors for a parameter (experts, n, m) changed twice (ParamWrapper.get_delta_weight):

    before 0.19    A (experts r, n), B (m, r experts)     the delta is transposed
    0.19.0         the same; modules with is_transposed: A (experts r, m), B (n, r experts)
    from 0.19.1    A (experts r, m), B (n, r experts); modules with is_transposed: the delta is transposed

The shapes of the factors decide wherever n and m differ. For square experts the version decides, which PEFT writes into
the config since 0.18. Llama 4 stores (experts, in, out) without is_transposed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.lora import ExpertModule, ExpertUps, LoraModule, StackModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

from .bound import BoundModule
from .embeddings import text_config
from .transformers_names import StoredRows
from .weight_names import DOWNS, GATES, UPS, Renaming

TRANSPOSED_EXPERTS = ("gpt_oss", "aria_text", "openai_privacy_filter")  # is_transposed in transformers 5
INPUT_FIRST = (*TRANSPOSED_EXPERTS, "llama4_text")  # stacked as (experts, in, out)
PARAMETER_ORDER = ("gate_up_proj", "up_proj", "down_proj")  # the order in transformers' expert modules
TRANSPOSED_BEFORE = (0, 19, 0)
UNTRANSPOSED_FROM = (0, 19, 1)


def bind_stack(
    module: StackModule, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> list[BoundModule] | Problem:
    """Bind the experts of a stacked parameter, or one 2-D parameter, to the stored rows; or return the problem."""
    rows, columns = module.b.shape[0], module.a.shape[1]
    square = rows == columns
    stated = _is_transposed(adapter, base)
    fits: list[tuple[str, bool, list[BoundModule]]] = []
    quantised: list[str] = []
    for parameter, rank, scale in module.targets:
        experts = module.a.shape[0] // rank
        shape, stored = _find_stored_rows(f"{module.name}.{parameter}", experts, rename)
        quantised += [item.ref.name for item in stored if item.ref.dtype not in FLOAT_DTYPES]
        if not stored or quantised:
            continue
        if shape == (rows, columns) and experts == 1 and len(stored) == 1 and not stored[0].turned:
            plain = LoraModule(module.name, module.a, module.b, scale, parameter=parameter)
            fits.append((parameter, False, [BoundModule(plain, stored[0].ref)]))
        elif shape in ((experts, rows, columns), (experts, columns, rows)):
            turned = stated if square else shape[1] == columns
            if turned is None:
                return Problem(
                    f"{module.name}.{parameter}: square experts, and the orientation of their factors is unknown",
                    "peft_version in adapter_config.json",
                    repr(adapter.config.get("peft_version"))[:100],
                    "add the version of PEFT that saved the adapter: 0.19.1 changed the orientation",
                )
            fits.append((parameter, turned, _bind_experts(module, parameter, experts, scale, shape, stored, turned)))
    if len(fits) > 1 and stated is not None:
        fits = [fit for fit in fits if fit[1] == stated]
    if len(fits) > 1:
        fits = _select_by_nesting(fits, module, rename)
    if len(fits) == 1:
        return fits[0][2]
    if quantised:
        return Problem(f"{quantised[0]}: the base's weight is quantised", "/".join(FLOAT_DTYPES),
                       rename.tensors[quantised[0]].dtype if quantised[0] in rename.tensors else None,
                       "merge into the unquantised base, then quantise")  # fmt: skip
    return Problem(
        f"{module.name}: "
        + ("several targeted parameters have" if fits else "none of the targeted parameters has")
        + " the shape of the factors",
        f"a parameter ({', '.join(target[0] for target in module.targets)}) of (experts, {rows}, {columns})",
        f"A {module.a.shape}, B {module.b.shape}",
        "add the version of PEFT that saved the adapter to adapter_config.json (peft_version)" if fits else None,
    )


def _bind_experts(
    module: StackModule,
    parameter: str,
    experts: int,
    scale: float,
    shape: tuple[int, ...],
    stored: Sequence[StoredRows],
    turned: bool,
) -> list[BoundModule]:
    """Return one module per run of stored rows within one expert.

    shape: of the parameter, (experts, n, m). turned: the parameter is adapted by the transposed delta.
    """
    ups = ExpertUps(module.b, experts)
    bound = []
    for item in stored:
        size = shape[2] if item.turned else shape[1]
        across = turned != item.turned  # stored rows are columns of B A
        for first in range(item.parameter_rows[0], item.parameter_rows[1], size):
            index, stop = first // size, min(item.parameter_rows[1], (first // size + 1) * size)
            part = (first - index * size, stop - index * size)
            start = item.rows[0] + first - item.parameter_rows[0]
            rows = (start, start + stop - first)
            expert = ExpertModule(
                module.name,
                module.a,
                module.b,
                experts,
                index,
                scale,
                rows=(0, module.b.shape[0]) if across else part,
                columns=part if across else (0, module.a.shape[1]),
                ups=ups,
                target=parameter,
                turned=turned,
            )
            is_whole = len(item.ref.shape) == 2 and rows == (0, item.ref.rows)
            bound.append(BoundModule(expert, item.ref, across, rows=None if is_whole else rows))
    ups.uses = len(bound)
    return bound


def _select_by_nesting(
    fits: list[tuple[str, bool, list[BoundModule]]], module: StackModule, rename: Renaming
) -> list[tuple[str, bool, list[BoundModule]]]:
    """Select the fit by PEFT's nesting: it wraps the parameters of a module in order, and the first is innermost."""
    names = [target[0] for target in module.targets]
    if rename.mapped is not None:
        order = [name.rpartition(".")[2] for name in rename.mapped.shapes]
        names = sorted((name for name in names if name in order), key=order.index)
    elif set(names) <= set(PARAMETER_ORDER):
        names.sort(key=PARAMETER_ORDER.index)
    else:
        return fits
    if module.wrappers != len(names):
        return fits
    innermost = names[module.wrappers - 1 - module.depth]
    return [fit for fit in fits if fit[0] == innermost]


def _find_stored_rows(name: str, experts: int, rename: Renaming) -> tuple[tuple[int, ...], Sequence[StoredRows]]:
    """Return the shape of parameter `name` and its stored rows; () and () where the base does not have it."""
    mapped = rename.mapped
    parameter = mapped.parameter(name) if mapped is not None else None
    if mapped is not None and parameter is not None and mapped.rows_of(parameter):
        return mapped.shapes[parameter], mapped.rows_of(parameter)
    for form in rename.spellings(name):
        ref = rename.tensors.get(form)
        if ref is not None:
            return ref.shape, (StoredRows(ref, (0, ref.rows), (0, ref.rows)),)
    return _find_separate_experts(name, experts, rename)


def _is_transposed(adapter: Adapter, base: Checkpoint) -> bool | None:
    """Return whether the delta of square experts is transposed in the stored tensor; None where it is unknown."""
    model_type = text_config(base.config).get("model_type")
    transposed = model_type in TRANSPOSED_EXPERTS
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(adapter.config.get("peft_version")))
    if version is None:
        return True if transposed else None  # transposed by every version but 0.19.0
    number = tuple(int(part) for part in version.groups())
    if number < TRANSPOSED_BEFORE:
        return True
    return transposed if number >= UNTRANSPOSED_FROM else not transposed


def _find_separate_experts(name: str, experts: int, rename: Renaming) -> tuple[tuple[int, ...], Sequence[StoredRows]]:
    """Return shape and stored rows of experts with one 2-D tensor each per projection; () and () if one is missing."""
    owner, _, parameter = name.rpartition(".")
    kinds = {"gate_up_proj": (GATES, UPS), "up_proj": (UPS,), "down_proj": (DOWNS,)}.get(parameter, ())
    stored: list[StoredRows] = []
    shapes = set()
    for index in range(experts):
        for kind in kinds:
            names = [form for projection in kind for form in rename.spellings(f"{owner}.{index}.{projection}.weight")]
            ref = next((rename.tensors[form] for form in names if form in rename.tensors), None)
            if ref is None or len(ref.shape) != 2:
                return (), ()
            shapes.add(ref.shape)
            start = stored[-1].parameter_rows[1] if stored else 0
            stored.append(StoredRows(ref, (0, ref.rows), (start, start + ref.rows)))
    if len(shapes) != 1:
        return (), ()
    rows, columns = shapes.pop()
    return (experts, rows * len(kinds), columns), stored
