"""The commands that write: convert, merge, delta, factor."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .adapter_options import adapter_options, one_stated
from .cli import device_option, dry_run_option, emit, loading, output_option, progress_bar, report_options, say
from .commands_combine import INPUTS, combination_options, stated_inputs
from .hashing import HeadStart

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = click.Choice(["float32", "float16", "bfloat16"])


def _done(content: dict[str, Any], output: str, started: float, as_json: bool, quiet: bool) -> None:
    """The result: JSON, or a few lines for people; warnings on stderr."""
    noted = [f"{entry['name']}: {note}" for entry in content["adapters"] for note in entry.get("notes", ())]
    for warning in (*content.get("warnings", ()), *noted):
        say(f"warning: {warning}", quiet=quiet)
    if as_json:
        emit(content)
        return
    adapters = ", ".join(
        f"{entry['name']} ({entry['method']}, {entry['modules']} weights)" for entry in content["adapters"]
    )
    if content.get("dry_run"):
        planned = f", {content['bytes'] / 1e6:.1f} MB" if "bytes" in content else ""
        click.echo(f"would write {output}: {content['artefact']} from {adapters}{planned}")
        return
    size = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    click.echo(f"{output}: {content['artefact']} from {adapters}; {size / 1e6:.1f} MB in {seconds:.1f} s")
    for entry in content["adapters"]:
        if entry.get("evidence"):
            click.echo(f"  base taken as the {entry['base_kind']}: {entry['evidence']}")


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """I/N, counted from 1."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{value!r} is not I/N with 1 <= I <= N", ctx, param)
    return int(match[1]), int(match[2])


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes: 4096, 512M, 1.5GB, 2GiB."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", value.strip().upper())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 512M or 4GiB", ctx, param)
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def engine_options(function: F) -> F:
    """How a merge reads and writes: hashes, links, the way back, going on, splitting, device memory."""
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
            callback=_size,
            metavar="SIZE",
            help="Memory for tensors on each CUDA device; a quarter of what is free.",
        ),
    ):
        function = option(function)
    return function


@click.command()
@click.argument("checkpoint")
@output_option
@click.option("--base", help="The base, where the adapter needs it (DuDe of PEFT; heads of a DCFT checkpoint).")
@adapter_options
@dry_run_option
@report_options
def convert(checkpoint: str, output: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Write any adapter file (pickled ones included, without running their code) as a safe adapter folder."""
    from .conversion import convert as run

    started = time.perf_counter()
    base_kind, options = one_stated()
    content = run(checkpoint, output, base_kind=base_kind, options=options, **settings)
    _done(content, output, started, as_json, quiet)


@click.command()
@click.argument("inputs", nargs=-1, metavar=INPUTS)
@output_option
@click.option("--dtype", type=DTYPES, help="For all float tensors of the output; the base's own when not given.")
@engine_options
@combination_options
@adapter_options
@device_option
@dry_run_option
@report_options
def merge(inputs: tuple[str, ...], output: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Write the merged model: every adapted weight changed exactly, everything else carried over byte for byte.

    One argument is enough for a DCFT checkpoint, which holds its own base. Several adapters, each with a name, are
    combined in delta space: merge BASE a=DIR b=DIR --weight a=0.7 --weight b=0.3 --combine ties --density 0.5. Without
    names they are applied in turn: merge BASE FIRST SECOND, where SECOND was trained on BASE with FIRST merged.
    """
    started = time.perf_counter()
    hashed = inputs and settings["hashes"] and not (settings["dry_run"] or settings["finish"] or settings["part"])
    head_start = HeadStart(sorted(Path(inputs[0]).glob("*.safetensors")) if hashed else ())
    try:
        with loading():
            from .checkpoint import resolve
            from .merging import merge as run

        subject = stated_inputs(inputs)
        source = resolve(subject.folder) if subject.folder else Path()
        total = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
        with progress_bar("merging", total, quiet or as_json) as progress:
            content = run(
                subject.base,
                subject.adapter,
                output,
                base_kind=subject.base_kind,
                options=subject.options,
                progress=progress,
                head_start=head_start,
                **settings,
            )
    finally:
        head_start.stop()
    if settings["part"] is not None and not as_json and not settings["dry_run"]:
        seconds = time.perf_counter() - started
        click.echo(f"{output}: part {content['part']}, {len(content['files'])} files in {seconds:.1f} s")
        say("when all parts are made: the same command with --finish instead of --shards", quiet=quiet)
        return
    _done(content, output, started, as_json, quiet)


@click.command()
@click.argument("inputs", nargs=-1, metavar=INPUTS)
@output_option
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="Of the deltas.")
@combination_options
@adapter_options
@device_option
@dry_run_option
@report_options
def delta(inputs: tuple[str, ...], output: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Write the dense delta of every adapted weight, W' - W0, to OUTPUT/delta.safetensors.

    Of several adapters the delta of their combination, stated as for merge.
    """
    with loading():
        from .merging import delta as run

    started = time.perf_counter()
    base, adapter, base_kind, options = stated_inputs(inputs)
    content = run(base, adapter, output, base_kind=base_kind, options=options, **settings)
    _done(content, output, started, as_json, quiet)
    if content["not_included"]:
        say(f"not weight deltas, so not in it: {', '.join(content['not_included'])}", quiet=quiet)


@click.command()
@click.argument("inputs", nargs=-1, metavar=f"[BASE] ADAPTER | {INPUTS}")
@output_option
@click.option(
    "--rank", help="A plain LoRA of this rank (16), or that keeps this energy (0.99); truncated, with its error."
)
@click.option("--budget", type=float, help="MB for all factors together; ranks go where they buy most error.")
@click.option(
    "--scale",
    type=click.Choice(["fold", "exact"]),
    default="fold",
    show_default=True,
    help="With --rank or --budget: fold DoRA's row scale into the plain LoRA, or keep it exact beside the factors.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A text file: minimise the error of the layers' outputs on it instead of the weights'.",
)
@click.option("--end-to-end", is_flag=True, help="Compare the logits with the adapter as trained, on built-in prompts.")
@click.option("--prompts", type=click.Path(path_type=Path, dir_okay=False), help="Prompts for it: a file, one a line.")
@click.option("--max-error", type=float, help="Fail when a weight's relative error is above this.")
@combination_options
@adapter_options
@device_option
@dry_run_option
@report_options
def factor(
    inputs: tuple[str, ...],
    output: str,
    rank: str | None,
    scale: str,
    prompts: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Write LoRA-equivalent factors as a PEFT folder, exact unless --rank is given.

    DCFT, LoRA and PiSSA become a plain LoRA. DoRA and DuDe become a DoRA on the original base plus its row scales.
    BASE may be left out where no base weight is needed (DCFT, LoRA). Several named adapters give the factors of their
    combination: exact for linear, truncated to --rank for the rest.
    """
    with loading():
        from .factors import factor as run
        from .factors import parse_rank, read_prompts

    started = time.perf_counter()
    base, adapter, base_kind, options = stated_inputs(inputs)
    content = run(
        base,
        adapter,
        output,
        rank=parse_rank(rank) if rank is not None else None,
        keep_scale=scale == "exact",
        prompts=read_prompts(prompts) if prompts is not None else None,
        base_kind=base_kind,
        options=options,
        **settings,
    )
    _done(content, output, started, as_json, quiet)
    if not as_json and not settings["dry_run"]:
        _show_certificate(content)


def _show_certificate(content: dict[str, Any]) -> None:
    found = content["certificate"]
    low, high = found["ranks"]
    span = str(low) if low == high else f"{low} .. {high}"
    click.echo(
        f"  {content['form']}, rank {span}; relative error of dW at most {found['max_relative_error']:.2g}, "
        f"mean {found['mean_relative_error']:.2g}; energy kept {found['mean_energy']:.4%}"
    )
    end = found.get("end_to_end")
    if end is not None:
        click.echo(
            f"  end to end: |dlogit| at most {end['max_dlogit']:.2g}, mean {end['mean_dlogit']:.2g}; "
            f"KL {end['mean_kl']:.2g}; {end['greedy_equal']} of {end['greedy_total']} greedy tokens equal"
        )
