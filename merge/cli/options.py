"""Options that several commands take: --output, --device, --dry-run, --json, and those of the merge engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


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


DTYPES = click.Choice(["float32", "float16", "bfloat16"])


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """I/N, counted from 1."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{value!r} is not I/N with 1 <= I <= N", ctx, param)
    return int(match[1]), int(match[2])


if TYPE_CHECKING:
    SizeType = click.ParamType[int]
else:
    SizeType = click.ParamType  # no generic before click 8.4


class Size(SizeType):
    """Bytes of a size with its unit: 512MB are 512,000,000, 4GiB are 4 x 1024^3, 4096B are 4096.

    A number without a unit is refused: one reader takes 5 for bytes, the next for gigabytes.
    """

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)", str(value).strip().upper())
        if match is None:
            self.fail(f"{value!r} is not a size with a unit, such as 512MB or 4GiB", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


SIZE = Size()


def engine_options(function: F) -> F:
    """Options of the merge engine: hashes, links, pre-images, resuming, splitting, device memory."""
    for option in (
        click.option("--finish", is_flag=True, help="Check that all --shards parts are there and write the rest."),
        click.option(
            "--shards",
            "part",
            callback=_part,
            metavar="I/N",
            help="Make the I-th of N parts; any machines, one file system; then --finish.",
        ),
        click.option("--keep-partial", is_flag=True, help="Leave finished files when this run fails; a rerun goes on."),
        click.option("--keep-preimage", is_flag=True, help="Keep what is overwritten: restore then needs no base."),
        click.option("--hashes/--no-hashes", default=True, help="sha256 of every file in the manifest.  [default: on]"),
        click.option(
            "--link",
            type=click.Choice(["auto", "reflink", "hardlink", "copy"]),
            default="auto",
            show_default=True,
            help="Files that no adapter touches; auto: reflink where the file system can, else copy.",
        ),
        click.option(
            "--vram",
            type=SIZE,
            metavar="SIZE",
            help="Memory for tensors on each CUDA device; a quarter of what is free.",
        ),
    ):
        function = option(function)
    return function
