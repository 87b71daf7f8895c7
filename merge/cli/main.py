"""The program adapter-merge: the table of its commands, and how errors end it.

`adapter-merge --help` imports only click; the module of a command, and torch with it, is imported when the command
runs. Data goes to stdout, progress and errors to stderr; with --json an error is also an object on stdout. Exit codes:
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

# name -> section of --help, module:attribute, and the line that --help shows without importing the module
MAKE, LOOK, DEPLOY, BEGIN = "Make", "Inspect and verify", "Deploy", "Get started"
COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "merge": (MAKE, "adapter_merge.cli.merge:merge", "Base + adapter -> a merged model."),
    "factor": (MAKE, "adapter_merge.cli.factor:factor", "Base + adapter -> low-rank factors (LoRA, DoRA)."),
    "delta": (MAKE, "adapter_merge.cli.delta:delta", "Base + adapter -> dense weight deltas."),
    "convert": (MAKE, "adapter_merge.cli.convert:convert", "Any adapter file -> a safe adapter folder."),
    "extract": (MAKE, "adapter_merge.cli.extract:extract", "Base + fine-tuned model -> the adapter between them."),
    "restore": (MAKE, "adapter_merge.cli.restore:restore", "A merged model -> its base, bit for bit."),
    "inspect": (LOOK, "adapter_merge.cli.inspect:inspect", "Show an adapter or artefact, and its problems."),
    "verify": (LOOK, "adapter_merge.cli.verify:verify", "Check that an artefact computes what was trained."),
    "attest": (LOOK, "adapter_merge.cli.attest:attest", "Provenance of an output, as an in-toto statement."),
    "report": (LOOK, "adapter_merge.cli.report:report", "Changes and losses of an artefact, as an HTML page."),
    "export": (DEPLOY, "adapter_merge.export.cli.export:export", "Base + adapters -> ONNX, merged or switchable."),
    "generate": (DEPLOY, "adapter_merge.export.cli.generate:generate", "Run an ONNX export."),
    "serve": (DEPLOY, "adapter_merge.serve.cli.serve:serve", "Serve a base and many adapters in vLLM."),
    "cache": (DEPLOY, "adapter_merge.serve.cli.cache:cache", "List or clear the serving cache."),
    "demo": (BEGIN, "adapter_merge.cli.demo:demo", "All steps on a real small model."),
    "doctor": (BEGIN, "adapter_merge.cli.doctor:doctor", "Versions, devices, and the commands that work here."),
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
    help="A TOML file with defaults of options.  [default: ~/.config/adapter-merge/config.toml]",
)
@click.pass_context
def group(ctx: click.Context, config: Path | None) -> None:
    """Put trained DCFT, DuDe, LoRA and DoRA adapters into production, and verify the result against training.

    BASE and ADAPTER are local folders or hub ids (org/model, org/model@revision). Every option can also be set by an
    environment variable: --device of merge by ADAPTER_MERGE_MERGE_DEVICE.
    """
    content = read_configuration(config)
    check_names(content, COMMANDS)
    ctx.meta[META] = content


def main() -> None:
    """Run the program; the console script calls this."""
    try:
        _main()
    finally:
        gc.freeze()  # a last garbage collection over all objects of torch would take most of a second


def _main() -> None:
    """Run the command line, print errors and exit with the command's code."""
    # OpenMP threads that spin while they wait slow down the other threads of a busy machine.
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
        report_error(AdapterMergeError("out of memory", hint="use a smaller model, or a machine with more memory"))
        sys.exit(1)
    except OSError as error:  # of the operating system
        if debug:
            raise
        cause = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        report_error(AdapterMergeError(cause, hint="check that the file exists, its permissions and its disk"))
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        cause = f"a bug of adapter-merge: {type(error).__name__}: {error}"
        report_error(
            AdapterMergeError(cause, hint="please report it, with the traceback that ADAPTER_MERGE_DEBUG=1 shows"),
            "Bug",
        )
        sys.exit(1)
