"""The adapter-merge command: a lazy table of commands, one way to report errors, one set of shared options.

`adapter-merge --help` imports click alone; a command's module, and torch with it, is loaded when that command runs.
Data goes to stdout, progress and errors to stderr; with --json an error is an object on stdout as well. Exit codes:
0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import click

from .errors import AdapterMergeError, Problem

# name -> module:attribute, and the line that --help shows without loading the module
COMMANDS: Mapping[str, tuple[str, str]] = {
    "inspect": (
        "adapter_merge.merge.commands_look:inspect",
        "What an adapter is, what it would do, and what is wrong.",
    ),
    "convert": ("adapter_merge.merge.commands_make:convert", "Any adapter file -> a safe adapter folder."),
    "merge": ("adapter_merge.merge.commands_make:merge", "Base + adapter -> a merged model."),
    "delta": ("adapter_merge.merge.commands_make:delta", "Base + adapter -> dense weight deltas."),
    "restore": ("adapter_merge.merge.commands_restore:restore", "A merged model -> its base, to the last bit."),
    "factor": ("adapter_merge.merge.commands_make:factor", "Base + adapter -> a LoRA-equivalent PEFT folder."),
    "extract": (
        "adapter_merge.merge.commands_combine:extract",
        "Base + fine-tuned model -> the adapter between them.",
    ),
    "export": ("adapter_merge.export.cli:export", "Base + adapters -> ONNX, merged or switchable."),
    "generate": ("adapter_merge.export.cli:generate", "Run an ONNX export."),
    "serve": ("adapter_merge.serve.cli:serve", "Serve a base and many adapters in vLLM."),
    "cache": ("adapter_merge.serve.cli:cache", "List or clear the serving cache."),
    "verify": ("adapter_merge.merge.commands_look:verify", "Prove an artefact equal to the adapter as trained."),
    "report": ("adapter_merge.merge.commands_report:report", "What it changes and what was lost: a page of pictures."),
    "demo": ("adapter_merge.merge.commands_look:demo", "The whole way on a real small model."),
    "doctor": ("adapter_merge.merge.commands_look:doctor", "Versions, devices, and what works here."),
}

F = TypeVar("F", bound=Callable[..., Any])


class LazyGroup(click.Group):
    """A group whose commands are imported only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="adapter-merge")
def group() -> None:
    """Put trained DCFT, DuDe, LoRA and DoRA adapters into production, and prove that what is deployed was trained.

    BASE and ADAPTER are local folders or hub ids (org/model, org/model@revision).
    """


def output_option(function: F) -> F:
    """-o/--output and --overwrite, as every command that writes takes them."""
    function = click.option("--overwrite", is_flag=True, help="Replace an output that adapter-merge wrote before.")(
        function
    )
    return click.option(
        "-o", "--output", required=True, type=click.Path(path_type=str), help="The folder to write; must not exist."
    )(function)


def device_option(function: F) -> F:
    """--device."""
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")(function)


def report_options(function: F) -> F:
    """--json, -q and -v."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="More on stderr."),
        click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    ):
        function = option(function)
    return function


def dry_run_option(function: F) -> F:
    """--dry-run."""
    return click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")(function)


def say(text: str, *, quiet: bool = False) -> None:
    """A line for people, on stderr."""
    if not quiet:
        click.echo(text, err=True)


def emit(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


@contextmanager
def progress_bar(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bytes progress bar on stderr where that is a terminal; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def wants_json() -> bool:
    """True when the command was told --json, whatever became of it."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def emit_error(problems: Sequence[Mapping[str, str | None]], kind: str) -> None:
    """With --json: {"error": {cause, expected, got, hint, kind, problems}}, the first problem and all of them."""
    if wants_json():
        emit({"error": {**problems[0], "kind": kind, "problems": list(problems)}})


def report_error(error: AdapterMergeError) -> None:
    """Every problem on stderr: `error:` in red where colour is wanted, then expected, got and hint; JSON on stdout."""
    emit_error([asdict(problem) for problem in error.problems], type(error).__name__)
    for problem in error.problems:
        first, *rest = str(problem).split("\n")
        red = "NO_COLOR" not in os.environ
        click.echo((click.style("error: ", fg="red", bold=True) if red else "error: ") + first, err=True)
        for line in rest:
            click.echo(line, err=True)


@contextmanager
def loading() -> Iterator[None]:
    """Inside, torch is imported, without going through all that it has made so far again and again."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def main() -> None:
    """The console entry point."""
    try:
        _main()
    finally:
        gc.freeze()  # going through all that torch has left once more, at the end, takes most of a second


def _main() -> None:
    # Threads that spin while they wait lose most of their time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = os.environ.get("ADAPTER_MERGE_DEBUG") == "1"
    try:
        code = group.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        emit_error([asdict(Problem("interrupted"))], "Interrupted")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        emit_error([asdict(Problem(error.format_message()))], "UsageError")
        sys.exit(error.exit_code)
    except AdapterMergeError as error:
        if debug:
            raise
        report_error(error)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        if debug:
            raise
        report_error(AdapterMergeError("out of memory", hint="a smaller model, or a machine with more memory"))
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: a bug of adapter-merge: {type(error).__name__}: {error}", err=True)
        click.echo("  hint: ADAPTER_MERGE_DEBUG=1 shows where; please report it", err=True)
        cause = f"a bug of adapter-merge: {type(error).__name__}: {error}"
        emit_error([asdict(Problem(cause, hint="ADAPTER_MERGE_DEBUG=1 shows where; please report it"))], "Bug")
        sys.exit(1)
