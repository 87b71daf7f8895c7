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
from collections.abc import Mapping
from pathlib import Path

import click

from adapter_merge.cli.options.configuration import META, check_names, read_configuration
from adapter_merge.cli.printing.console import report_error
from adapter_merge.errors import AdapterMergeError

# name -> section of --help, module:attribute, and the line that --help shows without loading the module
MAKE, LOOK, DEPLOY, BEGIN = "Make", "Look and prove", "Deploy", "Begin"
COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "merge": (MAKE, "adapter_merge.cli.merge:merge", "Base + adapter -> a merged model."),
    "factor": (MAKE, "adapter_merge.cli.factor:factor", "Base + adapter -> a LoRA-equivalent PEFT folder."),
    "delta": (MAKE, "adapter_merge.cli.delta:delta", "Base + adapter -> dense weight deltas."),
    "convert": (MAKE, "adapter_merge.cli.convert:convert", "Any adapter file -> a safe adapter folder."),
    "extract": (MAKE, "adapter_merge.cli.extract:extract", "Base + fine-tuned model -> the adapter between them."),
    "restore": (MAKE, "adapter_merge.cli.restore:restore", "A merged model -> its base, to the last bit."),
    "inspect": (LOOK, "adapter_merge.cli.inspect:inspect", "What an adapter or artefact is, and what is wrong."),
    "verify": (LOOK, "adapter_merge.cli.verify:verify", "Prove an artefact equal to the adapter as trained."),
    "attest": (LOOK, "adapter_merge.cli.attest:attest", "Provenance of an output, as an in-toto statement."),
    "report": (LOOK, "adapter_merge.cli.report:report", "What it changes and what was lost: a page of pictures."),
    "export": (DEPLOY, "adapter_merge.export.cli:export", "Base + adapters -> ONNX, merged or switchable."),
    "generate": (DEPLOY, "adapter_merge.export.cli:generate", "Run an ONNX export."),
    "serve": (DEPLOY, "adapter_merge.serve.cli.serve:serve", "Serve a base and many adapters in vLLM."),
    "cache": (DEPLOY, "adapter_merge.serve.cli.cache:cache", "List or clear the serving cache."),
    "demo": (BEGIN, "adapter_merge.cli.demo:demo", "The whole way on a real small model."),
    "doctor": (BEGIN, "adapter_merge.cli.doctor:doctor", "Versions, devices, and what works here."),
    "completion": (BEGIN, "adapter_merge.cli.completion:completion", "Completion of commands, options and paths."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][1].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for section in dict.fromkeys(section for section, _, _ in COMMANDS.values()):
            lines = [(f"{name:<{width}}", line) for name, (own, _, line) in COMMANDS.items() if own == section]
            with formatter.section(section):
                formatter.write_dl(lines)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.command(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "auto_envvar_prefix": "ADAPTER_MERGE",
    },
)
@click.version_option(package_name="adapter-merge")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Defaults of options, in TOML.  [default: ~/.config/adapter-merge/config.toml]",
)
@click.pass_context
def group(ctx: click.Context, config: Path | None) -> None:
    """Put trained DCFT, DuDe, LoRA and DoRA adapters into production, and prove that what is deployed was trained.

    BASE and ADAPTER are local folders or hub ids (org/model, org/model@revision). Every option may also be an
    environment variable: --device of merge is ADAPTER_MERGE_MERGE_DEVICE.
    """
    content = read_configuration(config)
    check_names(content, COMMANDS)
    ctx.meta[META] = content


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
        code = group.main(prog_name="adapter-merge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except (click.Abort, KeyboardInterrupt):
        report_error(AdapterMergeError("interrupted"), "Interrupted")
        sys.exit(130)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context is not None else None
        report_error(AdapterMergeError(error.format_message(), hint=hint), "UsageError")
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
        cause = f"a bug of adapter-merge: {type(error).__name__}: {error}"
        report_error(AdapterMergeError(cause, hint="ADAPTER_MERGE_DEBUG=1 shows where; please report it"), "Bug")
        sys.exit(1)
