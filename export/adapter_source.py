"""Any adapter as factors: a factor folder is read as it is, all other forms through merge/'s canonical form."""

from __future__ import annotations

from pathlib import Path

from adapter_merge.merge.checkpoint import read_json, resolve
from adapter_merge.merge.errors import InputError, Problem, UnsupportedError, raise_all

from .factor_folder import Factors, LinearFactors, read_factors

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def is_factor_folder(folder: Path) -> bool:
    """True when `folder` holds the factors that `adapter-merge factor` wrote."""
    manifest = folder / "adapter_merge.json"
    return manifest.is_file() and read_json(manifest).get("artefact") == "factors"


def factors_of(base: Path, adapter: Path) -> Factors:
    """The factors of `adapter` (any form) on `base`, of which only what they need is read (DuDe: its rows)."""
    if is_factor_folder(adapter):
        return read_factors(adapter)
    import torch
    from adapter_merge.merge.merging import open_pair
    from adapter_merge.merge.tensors import read_tensor

    bound = open_pair(base, adapter)
    bound.adapter.check_values()
    linears = {}
    problems = []
    notes = list(bound.adapter.notes)
    for module in bound.modules:
        path = module.name.removesuffix(".weight")
        form = module.form(torch.float32)
        if form.magnitude is not None:
            form = form.bound_to(module.oriented_weight().float())
        if form.col_scale is not None:
            problems.append(
                Problem(
                    f"{adapter}: {path} scales its input columns, which factors and a row scale cannot express",
                    hint="export with --mode merged",
                )
            )
            continue
        residual = form.residual
        if residual is not None and residual.dtype != torch.float32:
            notes.append(f"{path}: trained beside a residual in {residual.dtype}; its rounding is not in the factors")
        form = form.folded()
        scale = None if form.row_scale is None else form.row_scale.contiguous().numpy()
        linears[path] = LinearFactors(form.down.contiguous().numpy(), form.up.contiguous().numpy(), scale)
    raise_all(problems, UnsupportedError)
    replaced = {name: read_tensor(ref).float().numpy() for name, ref in bound.replacements.items()}
    return Factors(adapter, linears, replaced, bound.base.fingerprint, bound.adapter.method, tuple(notes))


def parse_adapters(entries: tuple[str, ...]) -> dict[str, Path]:
    """NAME=ADAPTER entries. Raises InputError with every problem (a name becomes a file name)."""
    adapters: dict[str, Path] = {}
    problems = []
    for entry in entries:
        name, equals, source = entry.partition("=")
        if not equals or not name or not source:
            problems.append(Problem(f"{entry!r} is not NAME=ADAPTER", hint="for example german=./adapter-de"))
        elif name.startswith(".") or not set(name) <= NAME_CHARACTERS:
            problems.append(
                Problem(f"{name!r} cannot name an adapter", "letters, digits, '.', '_' and '-', not a dot first")
            )
        elif name in adapters or name == "base":
            problems.append(Problem(f"the adapter name {name!r} is taken", "names of their own, and not 'base'"))
        else:
            try:
                adapters[name] = resolve(source)
            except InputError as error:
                problems.extend(error.problems)
    raise_all(problems, InputError)
    return adapters
