"""What a user states of an adapter against what its files hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapter_merge.errors import Problem
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_io import read_tensor


def against(option: str, stated: float | None, held: object, where: Path) -> tuple[Problem, ...]:
    """Return the contradiction between a stated number and the number that a config holds; nothing where it has none.

    A value that is no number is not held against the statement: stating it is the way to repair such a config.
    """
    if stated is None or isinstance(held, bool) or not isinstance(held, int | float) or held == stated:
        return ()
    return (_contradiction(option, f"{stated:g}", f"{held:g}", where),)


def against_name(option: str, stated: str | None, held: str | None, where: Path) -> tuple[Problem, ...]:
    """Return the contradiction between a stated name and the one that a config holds; nothing where it has none."""
    if stated is None or held is None or held == stated:
        return ()
    return (_contradiction(option, stated, held, where),)


def against_tensors(
    option: str, stated: float | None, refs: Iterable[TensorRef | None], where: Path
) -> tuple[Problem, ...]:
    """Return the contradiction between a stated number and the one-number tensors that a file holds."""
    if stated is None:
        return ()
    held = {
        float(read_tensor(ref).reshape(-1)[0])
        for ref in refs
        if ref is not None and ref.dtype in FLOAT_DTYPES and ref.nbytes
    }
    other = sorted(value for value in held if abs(value - stated) > 4e-3 * abs(stated))  # bfloat16 rounds a number
    return (_contradiction(option, f"{stated:g}", f"{other[0]:g}", where),) if other else ()


def _contradiction(option: str, stated: str, held: str, where: Path) -> Problem:
    return Problem(
        f"{where}: holds {option} {held}, which --{option} {stated} contradicts",
        hint=f"leave --{option} out; --force uses the stated value",
    )
