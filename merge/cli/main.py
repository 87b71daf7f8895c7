"""The adapter-merge command: a lazy table of commands, one way to report errors, one set of shared options.

`adapter-merge --help` imports click alone; a command's module, and torch with it, is loaded when that command runs.
Data goes to stdout, progress and errors to stderr; with --json an error is an object on stdout as well. Exit codes:
0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import click

from adapter_merge.errors import AdapterMergeError, Problem

from .console import emit_error, report_error

# name -> module:attribute, and the line that --help shows without loading the module
COMMANDS: Mapping[str, tuple[str, str]] = {
    "inspect": (
        "adapter_merge.cli.inspect:inspect",
        "What an adapter is, what it would do, and what is wrong.",
    ),
    "convert": ("adapter_merge.cli.convert:convert", "Any adapter file -> a safe adapter folder."),
    "merge": ("adapter_merge.cli.merge:merge", "Base + adapter -> a merged model."),
    "delta": ("adapter_merge.cli.delta:delta", "Base + adapter -> dense weight deltas."),
    "restore": ("adapter_merge.cli.restore:restore", "A merged model -> its base, to the last bit."),
    "factor": ("adapter_merge.cli.factor:factor", "Base + adapter -> a LoRA-equivalent PEFT folder."),
    "extract": (
        "adapter_merge.cli.extract:extract",
        "Base + fine-tuned model -> the adapter between them.",
    ),
    "export": ("adapter_merge.export.cli:export", "Base + adapters -> ONNX, merged or switchable."),
    "generate": ("adapter_merge.export.cli:generate", "Run an ONNX export."),
    "serve": ("adapter_merge.serve.cli:serve", "Serve a base and many adapters in vLLM."),
    "cache": ("adapter_merge.serve.cli:cache", "List or clear the serving cache."),
    "verify": ("adapter_merge.cli.verify:verify", "Prove an artefact equal to the adapter as trained."),
    "attest": ("adapter_merge.cli.attest:attest", "Provenance of an output, as an in-toto statement."),
    "report": ("adapter_merge.cli.report:report", "What it changes and what was lost: a page of pictures."),
    "demo": ("adapter_merge.cli.demo:demo", "The whole way on a real small model."),
    "doctor": ("adapter_merge.cli.doctor:doctor", "Versions, devices, and what works here."),
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
    except OSError as error:  # of the system, not ours
        if debug:
            raise
        cause = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        report_error(AdapterMergeError(cause, hint="check that it is there, its permissions and its disk"))
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: a bug of adapter-merge: {type(error).__name__}: {error}", err=True)
        click.echo("  hint: ADAPTER_MERGE_DEBUG=1 shows where; please report it", err=True)
        cause = f"a bug of adapter-merge: {type(error).__name__}: {error}"
        emit_error([asdict(Problem(cause, hint="ADAPTER_MERGE_DEBUG=1 shows where; please report it"))], "Bug")
        sys.exit(1)
