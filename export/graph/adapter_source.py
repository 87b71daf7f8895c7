"""Factors of any adapter: a factor folder is read, any other format is factored first."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from adapter_merge.errors import InputError, Problem, raise_all
from adapter_merge.files.input_snapshot import snapshot_folder
from adapter_merge.storage.checkpoint import read_json, resolve

from .factor_folder import Factors, read_factors

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def is_factor_folder(folder: Path) -> bool:
    """Return True when `adapter-merge factor` wrote `folder`."""
    manifest = folder / "adapter_merge.json"
    return manifest.is_file() and read_json(manifest).get("artefact") == "factors"


def factors_of(base: Path, adapter: Path, force: bool = False) -> Factors:
    """Return the factors of `adapter`, in any format, on `base`, with all values in memory.

    Of the base only the weights that the factorisation needs are read. Raises FileFormatError where a file of `adapter`
    changes while it is read, and MismatchError where evidence contradicts the base, unless `force`.
    """
    from adapter_merge.combine.open_inputs import open_pair
    from adapter_merge.formats.stated_settings import ReadOptions

    options = ReadOptions(force=True) if force else None
    if is_factor_folder(adapter):
        inputs = snapshot_folder(adapter)
        factors = read_factors(adapter)
        origin = open_pair(base, adapter, None, options).origin
        inputs.check()
        return replace(
            factors, origin=origin.text, contradictions=tuple(problem.cause for problem in origin.contradictions)
        )
    from adapter_merge.api.factor import factor
    from adapter_merge.api.options import FactorOptions

    with tempfile.TemporaryDirectory(prefix="adapter-merge-factors-") as temporary:
        folder = Path(temporary) / "factors"
        result = factor(base, adapter, folder, FactorOptions(device="cpu", frozen_positions=True, reading=options))
        (entry,) = result.as_json()["adapters"]
        evidence = {"origin": entry["origin"], "contradictions": tuple(entry["contradictions"])}
        return replace(read_factors(folder, adapter), **evidence)


def parse_adapters(entries: tuple[str, ...]) -> dict[str, Path]:
    """Parse NAME=ADAPTER entries. Raises InputError with every problem (a name becomes a file name)."""
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
            problems.append(
                Problem(
                    f"the adapter name {name!r} is used twice or reserved",
                    "a different name for each adapter, not 'base'",
                )
            )
        else:
            try:
                adapters[name] = resolve(source)
            except InputError as error:
                problems.extend(error.problems)
    raise_all(problems, InputError)
    return adapters
