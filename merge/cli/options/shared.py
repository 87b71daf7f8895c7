"""Options that several commands share: output, device, dry run, reporting, and those of the merge engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from adapter_merge.cli.printing.console import LEVELS, set_color, set_log_level

from .command import ENGINE, GENERAL, OUTPUT, OutputOption, option
from .values import DEVICE, SIZE

F = TypeVar("F", bound=Callable[..., Any])


def output_option(function: F) -> F:
    """Add -o/--output and --overwrite to a command with any number of inputs.

    The last argument may be OUT instead of -o (Command._take_output).
    """
    function = option("--overwrite", is_flag=True, section=OUTPUT, help="Replace an existing output of adapter-merge.")(
        function
    )
    return option(
        "-o",
        "--output",
        cls=OutputOption,
        section=OUTPUT,
        metavar="OUT",
        type=click.Path(path_type=str),
        help="The folder to write, which must not exist; may also be the last argument, without -o.",
    )(function)


def output_argument(function: F) -> F:
    """Add the argument [OUT] to a command with a fixed number of inputs, and the options of `output_option`."""
    function = output_option(function)
    return click.argument("out", required=False, type=click.Path(path_type=str))(function)


def device_option(function: F) -> F:
    """Add the option --device."""
    return option(
        "--device",
        type=DEVICE,
        default="auto",
        show_default=True,
        section=ENGINE,
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N.",
    )(function)


VERBOSE = "adapter_merge.verbose"


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[VERBOSE] = value


def _log_level(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    set_log_level(value or ("info" if ctx.meta.get(VERBOSE) else None))


def _color(ctx: click.Context, param: click.Parameter, value: str) -> None:
    set_color(value)


def report_options(function: F) -> F:
    """Add the options --json, -q, -v, --log-level and --color."""
    for decorate in (
        option(
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            section=GENERAL,
            expose_value=False,
            callback=_color,
            help="Whether output is coloured.",
        ),
        option(
            "--log-level",
            type=click.Choice(LEVELS),
            section=GENERAL,
            expose_value=False,
            callback=_log_level,
            help="Lowest level of log lines on stderr; default: warning.",
        ),
        option(
            "-v",
            "--verbose",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_verbose,
            section=GENERAL,
            help="Log each step, and show every problem of an error; sets --log-level info.",
        ),
        option("-q", "--quiet", is_flag=True, section=GENERAL, help="Print only errors on stderr."),
        option(
            "--json", "as_json", is_flag=True, section=GENERAL, help="Print the result as one JSON object on stdout."
        ),
    ):
        function = decorate(function)
    return function


def dry_run_option(function: F) -> F:
    """Add the option --dry-run."""
    return option("--dry-run", is_flag=True, section=OUTPUT, help="Check everything, write nothing.")(function)


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Parse I/N, counted from 1. Raises BadParameter."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{value!r} is not I/N with 1 <= I <= N", ctx, param)
    return int(match[1]), int(match[2])


def ray_option(function: F) -> F:
    """Add the option --ray."""
    return option(
        "--ray",
        metavar="ADDRESS",
        section=ENGINE,
        help="Write the weights by tasks of a Ray cluster: auto, or HOST:PORT of its head. Its machines share BASE, "
        "ADAPTER and OUT on one file system; --device cuda takes a GPU per task, auto is the CPU.",
    )(function)


def engine_options(function: F) -> F:
    """Add the options of the merge engine: hashes, links, pre-images, resuming, splitting, device memory."""
    for decorate in (
        option(
            "--finish",
            is_flag=True,
            section=ENGINE,
            help="After all --shards parts: check them, and write the other files.",
        ),
        option(
            "--shards",
            "part",
            callback=_part,
            metavar="I/N",
            section=ENGINE,
            help="Write only part I of N. Several machines may share the parts, on one file system; then --finish.",
        ),
        option(
            "--keep-partial",
            is_flag=True,
            section=ENGINE,
            help="Keep finished files where this run fails, so that the next run resumes.",
        ),
        option(
            "--keep-preimage",
            is_flag=True,
            section=ENGINE,
            help="Store the base's changed bytes in the output, so that restore needs no base.",
        ),
        option(
            "--hashes/--no-hashes",
            default=True,
            section=ENGINE,
            help="Write the sha256 of every file into the manifest.  [default: on]",
        ),
        link_option("How unchanged files are written; auto: reflink where the file system supports it, else copy."),
        option(
            "--vram",
            type=SIZE,
            metavar="SIZE",
            section=ENGINE,
            help="Memory to use on each CUDA device; default: a quarter of the free memory.",
        ),
    ):
        function = decorate(function)
    return function


def link_option(text: str) -> Callable[[F], F]:
    """Add the option --link with the help `text`."""
    return option(
        "--link",
        type=click.Choice(["auto", "reflink", "hardlink", "copy"]),
        default="auto",
        show_default=True,
        section=ENGINE,
        help=text,
    )
