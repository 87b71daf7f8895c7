"""Comparison of the settings that a user states for an adapter with those that its files hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapter_merge.errors import Problem
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_io import read_tensor


def compare_number(option: str, stated: float | None, stored: object, file: Path) -> tuple[Problem, ...]:
    """Return the contradiction between a stated number and the config's number; () where they agree or one is missing.

    A stored value that is not a number is no contradiction: stating the number is the way to repair such a config.
    """
    if stated is None or isinstance(stored, bool) or not isinstance(stored, int | float) or stored == stated:
        return ()
    return (_contradiction(option, f"{stated:g}", f"{stored:g}", file),)


def compare_name(option: str, stated: str | None, stored: str | None, file: Path) -> tuple[Problem, ...]:
    """Return the contradiction between a stated name and the config's name; () where they agree or one is missing."""
    if stated is None or stored is None or stored == stated:
        return ()
    return (_contradiction(option, stated, stored, file),)


def compare_number_tensors(
    option: str, stated: float | None, refs: Iterable[TensorRef | None], file: Path
) -> tuple[Problem, ...]:
    """Return the contradiction between a stated number and the tensors of one number `refs`; () where they agree."""
    if stated is None:
        return ()
    stored = {
        float(read_tensor(ref).reshape(-1)[0])
        for ref in refs
        if ref is not None and ref.dtype in FLOAT_DTYPES and ref.nbytes
    }
    different = sorted(
        value for value in stored if abs(value - stated) > 4e-3 * abs(stated)
    )  # a number stored in bfloat16 is rounded
    return (_contradiction(option, f"{stated:g}", f"{different[0]:g}", file),) if different else ()


def _contradiction(option: str, stated: str, stored: str, file: Path) -> Problem:
    return Problem(
        f"{file}: holds {option} {stored}, which --{option} {stated} contradicts",
        hint=f"leave --{option} out; --force uses the stated value",
    )
