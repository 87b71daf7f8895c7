"""Options that several commands take, each declared once: output, device, dry run, hub, what is printed, the engine."""

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
    """-o/--output and --overwrite of a command with any number of inputs; the last argument may be OUT in place of -o.

    See Command._take_output.
    """
    function = option(
        "--overwrite", is_flag=True, section=OUTPUT, help="Replace an output that adapter-merge wrote before."
    )(function)
    return option(
        "-o",
        "--output",
        cls=OutputOption,
        section=OUTPUT,
        metavar="OUT",
        type=click.Path(path_type=str),
        help="The folder to write; must not exist. May be the last argument, without -o.",
    )(function)


def output_argument(function: F) -> F:
    """[OUT] of a command with a fixed number of inputs, and the options of `output_option`."""
    function = output_option(function)
    return click.argument("out", required=False, type=click.Path(path_type=str))(function)


def device_option(function: F) -> F:
    """--device."""
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
    """--json, -q, -v, --log-level and --color."""
    for decorate in (
        option(
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            section=GENERAL,
            expose_value=False,
            callback=_color,
            help="Colour in what is printed.",
        ),
        option(
            "--log-level",
            type=click.Choice(LEVELS),
            section=GENERAL,
            expose_value=False,
            callback=_log_level,
            help="Which of the library's log lines go to stderr; warning when not given.",
        ),
        option(
            "-v",
            "--verbose",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_verbose,
            section=GENERAL,
            help="What is read, decided and written, and every problem of an error: --log-level info.",
        ),
        option("-q", "--quiet", is_flag=True, section=GENERAL, help="Nothing on stderr but errors."),
        option("--json", "as_json", is_flag=True, section=GENERAL, help="One JSON object on stdout."),
    ):
        function = decorate(function)
    return function


def dry_run_option(function: F) -> F:
    """--dry-run."""
    return option("--dry-run", is_flag=True, section=OUTPUT, help="Check everything, write nothing.")(function)


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """I/N, counted from 1."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{value!r} is not I/N with 1 <= I <= N", ctx, param)
    return int(match[1]), int(match[2])


def engine_options(function: F) -> F:
    """Options of the merge engine: hashes, links, pre-images, resuming, splitting, device memory."""
    for decorate in (
        option(
            "--finish", is_flag=True, section=ENGINE, help="Check that all --shards parts are there and write the rest."
        ),
        option(
            "--shards",
            "part",
            callback=_part,
            metavar="I/N",
            section=ENGINE,
            help="Make the I-th of N parts; any machines, one file system; then --finish.",
        ),
        option(
            "--keep-partial",
            is_flag=True,
            section=ENGINE,
            help="Leave finished files when this run fails; a rerun goes on.",
        ),
        option(
            "--keep-preimage",
            is_flag=True,
            section=ENGINE,
            help="Keep what is overwritten: restore then needs no base.",
        ),
        option(
            "--hashes/--no-hashes",
            default=True,
            section=ENGINE,
            help="sha256 of every file in the manifest.  [default: on]",
        ),
        link_option("Files that no adapter touches; auto: reflink where the file system can, else copy."),
        option(
            "--vram",
            type=SIZE,
            metavar="SIZE",
            section=ENGINE,
            help="Memory for tensors on each CUDA device; a quarter of what is free.",
        ),
    ):
        function = decorate(function)
    return function


def link_option(text: str) -> Callable[[F], F]:
    """--link."""
    return option(
        "--link",
        type=click.Choice(["auto", "reflink", "hardlink", "copy"]),
        default="auto",
        show_default=True,
        section=ENGINE,
        help=text,
    )
