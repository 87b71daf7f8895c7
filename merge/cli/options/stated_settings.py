"""Options for settings that an adapter's files do not hold. Their values are kept in the context (`read_stated`).

The value of an option is VALUE, which holds for all adapters, or NAME=VALUE for one of several named adapters. A file
belongs to one adapter, so with several adapters it needs a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .command import ADAPTER, option
from .values import SOURCE

if TYPE_CHECKING:
    from adapter_merge.formats.stated_settings import ReadOptions

F = TypeVar("F", bound=Callable[..., Any])
META = "adapter_merge.stated"
NUMBER, CHOICE, PATH, TEXT, FLAG = "NUMBER", "CHOICE", "PATH", "TEXT", "FLAG"
WRITTEN = "gguf"  # --format gguf: the format that `factor` writes
FORMATS = ("peft", "native", "dcft", "dcft-reshape", "mytransformers", "kohya")
# option, kind, choices, help
OPTIONS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    (
        "--base-kind",
        CHOICE,
        ("original", "residual"),
        "PiSSA, DuDe: whether BASE is the original or the residual; default: decided by its weights.",
    ),
    ("--alpha", NUMBER, (), "DCFT: lora_alpha, where no config states it."),
    ("--ranknum", NUMBER, (), "DCFT: ranknum, where the file does not hold it."),
    ("--format", CHOICE, FORMATS, "The format of the adapter; default: detected."),
    ("--magnitudes", PATH, (), "DoRA, DuDe: a file or folder with the magnitudes that PEFT dropped."),
    ("--init-adapter", PATH, (), "PiSSA, CorDA, LoRA-GA: the PEFT folder saved before training."),
    ("--residual-dtype", CHOICE, ("float32", "bfloat16", "float16"), "PiSSA, DuDe: the residual's dtype."),
    ("--magnitude-axis", CHOICE, ("out", "in"), "The dimension of a magnitude, where a square weight leaves it open."),
    (
        "--trained-on",
        TEXT,
        (),
        "QLoRA: how the unquantised BASE was quantised at training: nf4, nf4-double, fp4, fp4-double; or original. "
        "Optional: ,block=64 and ,dtype=bfloat16.",
    ),
    ("--prefix", TEXT, (), "Prefix of the adapter's module names in BASE, where they fit several parts of it."),
    ("--force", FLAG, (), "Use an adapter although evidence contradicts BASE or a statement; the manifest records it."),
)


def adapter_options(function: F) -> F:
    """Add the options for settings that an adapter's files do not hold; `read_stated` returns their values."""
    for name, kind, choices, text in reversed(OPTIONS):
        if kind == FLAG:
            function = option(name, is_flag=True, help=text, section=ADAPTER, expose_value=False, callback=_keep)(
                function
            )
            continue
        shown = "|".join(choices) if kind == CHOICE else kind
        of_kind: dict[str, Any] = {"type": SOURCE} if kind == PATH else {}
        if kind == CHOICE:
            of_kind["shell_complete"] = partial(_complete_choice, choices)
        function = option(
            name,
            multiple=True,
            section=ADAPTER,
            **of_kind,
            metavar=f"[NAME=]{shown}",
            help=text,
            expose_value=False,
            callback=_keep,
        )(function)
    return function


def _complete_choice(choices: Sequence[str], ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [choice for choice in choices if choice.startswith(incomplete)]


def _keep(context: click.Context, parameter: click.Parameter, value: tuple[str, ...] | bool) -> None:
    context.meta.setdefault(META, {})[parameter.name] = value


def read_stated(names: Sequence[str] = ()) -> dict[str, tuple[str | None, ReadOptions]]:
    """Return (base_kind, ReadOptions) of each named adapter, from the options of the running command.

    Without names, the result has one adapter, "", and "=" in a value has no meaning. Raises UsageError for a wrong
    value, and for a name that no adapter has.
    """
    from adapter_merge.formats.stated_settings import ReadOptions

    given = click.get_current_context().meta.get(META, {})
    stated: dict[str, dict[str, Any]] = {name: {} for name in names or ("",)}
    for flag, kind, choices, _ in OPTIONS:
        key = flag.removeprefix("--").replace("-", "_")
        if kind == FLAG:
            for values in stated.values():
                values.update({key: True} if given.get(key) else {})
            continue
        for text in given.get(key) or ():
            owner, value = _split_name(text, names)
            if names and owner is None and kind == PATH and len(names) > 1:
                raise click.UsageError(
                    f"{flag} {text}: state its adapter, {flag} NAME={text}, with one of {', '.join(names)}"
                )
            for name in stated if owner is None else (owner,):
                if key in stated[name] and owner is not None and stated[name][key] != value:
                    raise click.UsageError(f"{flag} has two values for {name}")
                stated[name][key] = _parse_value(flag, kind, choices, value)
    return {name: (values.pop("base_kind", None), ReadOptions(**values)) for name, values in stated.items()}


def has_stated() -> bool:
    """Return True where the running command has a value for any of these options."""
    return any(click.get_current_context().meta.get(META, {}).values())


def stated_arguments() -> list[str]:
    """Return these options of the running command as arguments of a command line."""
    words = []
    for key, given in click.get_current_context().meta.get(META, {}).items():
        flag = f"--{key.replace('_', '-')}"
        words += ([flag] if given else []) if isinstance(given, bool) else [f"{flag}={value}" for value in given]
    return words


def take_written_format() -> str:
    """Return "gguf" and remove it from the stated formats where --format gguf is given, else return "peft".

    --format gguf is the format that `factor` writes; other values are formats to read.
    """
    given = click.get_current_context().meta.get(META, {})
    stated = given.get("format") or ()
    given["format"] = tuple(text for text in stated if text != WRITTEN)
    return WRITTEN if WRITTEN in stated else "peft"


def read_single_stated() -> tuple[str | None, ReadOptions]:
    """Return (base_kind, ReadOptions) of a command with one adapter."""
    return read_stated()[""]


def _split_name(text: str, names: Sequence[str]) -> tuple[str | None, str]:
    """Return (adapter, value), with None for a value of all adapters. Raises UsageError for an unknown adapter."""
    name, mark, value = text.partition("=")
    if not names or not mark:
        return None, text
    if name not in names:
        raise click.UsageError(f"{text}: no adapter has the name {name!r}; names: {', '.join(names)}")
    return name, value


def _parse_value(flag: str, kind: str, choices: tuple[str, ...], text: str) -> Any:
    """Convert an option\'s value to its kind. Raises UsageError for a wrong value."""
    if kind == PATH:
        return Path(text)
    if kind == CHOICE and text not in choices:
        raise click.UsageError(f"{flag} {text}: expected {', '.join(choices)}")
    if kind == NUMBER:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise click.UsageError(f"{flag} {text}: expected a number")
        return number
    return text
