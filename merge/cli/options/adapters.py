"""What a user may state of adapters on the command line: options whose values wait in the context until asked for.

Every option is VALUE, or NAME=VALUE for one of several named adapters. A bare value is said of all of them; a file is
one adapter's, so that with several it needs a name.
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
    from adapter_merge.formats.read_options import ReadOptions

F = TypeVar("F", bound=Callable[..., Any])
META = "adapter_merge.stated"
NUMBER, CHOICE, PATH, TEXT, FLAG = "NUMBER", "CHOICE", "PATH", "TEXT", "FLAG"
WRITTEN = "gguf"  # --format gguf: what `factor` writes, not what it reads
FORMATS = ("peft", "native", "dcft", "dcft-reshape", "mytransformers", "kohya")
# option, kind, choices, help
OPTIONS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    (
        "--base-kind",
        CHOICE,
        ("original", "residual"),
        "PiSSA, DuDe: what BASE is. Decided by evidence when not given.",
    ),
    ("--alpha", NUMBER, (), "DCFT: lora_alpha, where the config does not say it."),
    ("--ranknum", NUMBER, (), "DCFT: ranknum, where the file has lost it."),
    ("--format", CHOICE, FORMATS, "What to read the adapter as, whatever it looks like."),
    ("--magnitudes", PATH, (), "DoRA, DuDe: a file or folder with the magnitudes that PEFT dropped."),
    ("--init-adapter", PATH, (), "PiSSA, CorDA, LoRA-GA: the PEFT folder saved before training."),
    ("--residual-dtype", CHOICE, ("float32", "bfloat16", "float16"), "PiSSA, DuDe: the residual's dtype."),
    ("--magnitude-axis", CHOICE, ("out", "in"), "What a magnitude belongs to, where a square weight hides it."),
    (
        "--trained-on",
        TEXT,
        (),
        "QLoRA: how the unquantised BASE was quantised at training: nf4, nf4-double, fp4, fp4-double; or original. "
        "Then ,block=64 and ,dtype=bfloat16.",
    ),
    ("--prefix", TEXT, (), "What stands before the adapter's names in the base, where it fits several parts."),
    ("--force", FLAG, (), "Use the adapters where evidence contradicts BASE or a statement; the manifest says so."),
)


def adapter_options(function: F) -> F:
    """What a user may state of an adapter whose files do not say everything. Read with `stated_of`."""
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


def stated_of(names: Sequence[str] = ()) -> dict[str, tuple[str | None, ReadOptions]]:
    """(base_kind, ReadOptions) of each named adapter, as the running command was told. Raises UsageError.

    Without names, one adapter under the name "": a value is then taken as it stands.
    """
    from adapter_merge.formats.read_options import ReadOptions

    said = click.get_current_context().meta.get(META, {})
    stated: dict[str, dict[str, Any]] = {name: {} for name in names or ("",)}
    for flag, kind, choices, _ in OPTIONS:
        key = flag.removeprefix("--").replace("-", "_")
        if kind == FLAG:
            for values in stated.values():
                values.update({key: True} if said.get(key) else {})
            continue
        for text in said.get(key) or ():
            owner, value = _split(text, names)
            if names and owner is None and kind == PATH and len(names) > 1:
                raise click.UsageError(f"{flag} {text}: whose is it? {flag} NAME={text}, with {', '.join(names)}")
            for name in stated if owner is None else (owner,):
                if key in stated[name] and owner is not None and stated[name][key] != value:
                    raise click.UsageError(f"{flag} says two things of {name}")
                stated[name][key] = _value(flag, kind, choices, value)
    return {name: (values.pop("base_kind", None), ReadOptions(**values)) for name, values in stated.items()}


def has_stated() -> bool:
    """Return True when the running command was told anything of an adapter."""
    return any(click.get_current_context().meta.get(META, {}).values())


def as_typed() -> list[str]:
    """Return the stated options of the running command as words of a command line."""
    words = []
    for key, said in click.get_current_context().meta.get(META, {}).items():
        flag = f"--{key.replace('_', '-')}"
        words += ([flag] if said else []) if isinstance(said, bool) else [f"{flag}={value}" for value in said]
    return words


def take_written_format() -> str:
    """Remove --format gguf, which names what `factor` writes, from the stated options: "gguf", or "peft" without it."""
    said = click.get_current_context().meta.get(META, {})
    stated = said.get("format") or ()
    said["format"] = tuple(text for text in stated if text != WRITTEN)
    return WRITTEN if WRITTEN in stated else "peft"


def one_stated() -> tuple[str | None, ReadOptions]:
    """(base_kind, ReadOptions) of a command that takes one adapter."""
    return stated_of()[""]


def _split(text: str, names: Sequence[str]) -> tuple[str | None, str]:
    """(adapter, value); None for a value of all of them. Raises UsageError for a name that is no adapter's."""
    name, mark, value = text.partition("=")
    if not names or not mark:
        return None, text
    if name not in names:
        raise click.UsageError(f"{text}: no adapter is called {name!r}; there are {', '.join(names)}")
    return name, value


def _value(flag: str, kind: str, choices: tuple[str, ...], text: str) -> Any:
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
