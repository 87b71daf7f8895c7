"""Classes of all commands and options: help in sections with examples, old names, positional OUT, configuration.

Every command in the table of main.py is a `Command`, and every option an `Option`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from .configuration import defaults_of

# The sections of a command's help, in this order.
OWN, OUTPUT, COMBINATION, ADAPTER, ENGINE, HUB, GENERAL = (
    "Options",
    "Output",
    "Several adapters",
    "Settings that the adapter's files do not hold",
    "Speed, space and safety",
    "Hugging Face hub",
    "General",
)
# Key in the context's meta of the steps that options such as --push-to add: (before the command, after it).
STEPS = "adapter_merge.steps"
Step = Callable[[click.Context], None]
SECTIONS = (OWN, OUTPUT, COMBINATION, ADAPTER, ENGINE, HUB, GENERAL)


class Option(click.Option):
    """An option with its section of the help. `old` names still work, and the help does not show them."""

    def __init__(self, param_decls: Sequence[str], section: str = OWN, old: Sequence[str] = (), **attrs: Any) -> None:
        super().__init__([*param_decls, *old], **attrs)
        self.section, self.old = section, tuple(old)

    @contextmanager
    def _without_old(self) -> Iterator[None]:
        all_names = self.opts
        self.opts = [name for name in all_names if name not in self.old]
        try:
            yield
        finally:
            self.opts = all_names

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        with self._without_old():
            return super().get_help_record(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        with self._without_old():
            return super().get_error_hint(ctx)  # type: ignore[arg-type,unused-ignore]


class OutputOption(Option):
    """The option -o/--output, whose value may also be the last argument, OUT. `needed`: one of both is required."""

    def __init__(self, param_decls: Sequence[str], needed: bool = True, **attrs: Any) -> None:
        super().__init__(param_decls, **attrs)
        self.needed = needed


F = TypeVar("F", bound=Callable[..., Any])


def option(*names: str, **attrs: Any) -> Callable[[F], F]:
    """click.option with `section` and `old` (see Option)."""
    return click.option(*names, **({"cls": Option} | attrs))


class Command(click.Command):
    """A command whose help has sections and examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records.setdefault(getattr(parameter, "section", GENERAL), []).append(record)
        for section in SECTIONS:
            if section in records:
                with formatter.section(section):
                    formatter.write_dl(records[section])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{ctx.command_path} {line}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.default_map = {**(ctx.default_map or {}), **defaults_of(ctx)}
        remaining = super().parse_args(ctx, args)
        self._take_output(ctx)
        return remaining

    def invoke(self, ctx: click.Context) -> Any:
        steps: Sequence[tuple[Step, Step]] = ctx.meta.get(STEPS, ())
        for before, _ in steps:
            before(ctx)
        result = super().invoke(ctx)
        for _, after in steps:
            after(ctx)
        return result

    def _take_output(self, ctx: click.Context) -> None:
        """Use the last argument as OUT where -o is not given and no file or folder has that name."""
        output = next((param for param in self.params if isinstance(param, OutputOption)), None)
        if output is None or output.name is None or ctx.resilient_parsing:
            return
        last = ctx.params.pop("out", None)
        if ctx.params[output.name] is not None:
            if last is not None:
                raise click.UsageError(f"the output is given twice: -o {ctx.params[output.name]} and {last}", ctx)
            return
        inputs = next((param for param in self.params if isinstance(param, click.Argument) and param.nargs == -1), None)
        if inputs is not None and inputs.name is not None:
            given = ctx.params[inputs.name]
            if given and "=" not in given[-1] and not Path(given[-1]).exists():
                last = given[-1]
                ctx.params[inputs.name] = given[:-1]
        if last is not None:
            ctx.params[output.name] = output.type_cast_value(ctx, last)
        elif output.needed:
            raise click.MissingParameter(ctx=ctx, param=output)


command = partial(click.command, cls=Command)
