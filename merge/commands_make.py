"""The commands that write: convert, merge, delta, factor."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from .cli import (
    adapter_options,
    device_option,
    dry_run_option,
    emit,
    output_option,
    progress_bar,
    read_options,
    report_options,
    say,
)
from .commands_combine import combination_options, stated_recipe

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = click.Choice(["float32", "float16", "bfloat16"])
PAIR = "BASE ADAPTER, or one DCFT checkpoint, which holds its own base"


def _pair(inputs: tuple[str, ...]) -> tuple[str | None, str]:
    """(base, adapter) from the arguments."""
    if len(inputs) == 1:
        return None, inputs[0]
    if len(inputs) == 2:
        return inputs[0], inputs[1]
    raise click.UsageError(f"expected {PAIR}; got {len(inputs)} arguments")


def _options(alpha: float | None, ranknum: float | None) -> Any:
    return read_options(alpha, ranknum)


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
            help="Memory to use on each CUDA device; a quarter of what is free.",
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
def convert(
    checkpoint: str,
    output: str,
    overwrite: bool,
    base: str | None,
    base_kind: str | None,
    alpha: float | None,
    ranknum: float | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write any adapter file (pickled ones included, without running their code) as a safe adapter folder."""
    from .conversion import convert as run

    started = time.perf_counter()
    content = run(
        checkpoint,
        output,
        base=base,
        base_kind=base_kind,
        options=_options(alpha, ranknum),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    _done(content, output, started, as_json, quiet)


@click.command()
@click.argument("inputs", nargs=-1, metavar="BASE ADAPTER | BASE NAME=ADAPTER...")
@output_option
@click.option("--dtype", type=DTYPES, help="For all float tensors of the output; the base's own when not given.")
@engine_options
@combination_options
@adapter_options
@device_option
@dry_run_option
@report_options
def merge(
    inputs: tuple[str, ...],
    output: str,
    overwrite: bool,
    dtype: str | None,
    base_kind: str | None,
    alpha: float | None,
    ranknum: float | None,
    device: str,
    vram: int | None,
    link: str,
    hashes: bool,
    keep_preimage: bool,
    keep_partial: bool,
    part: tuple[int, int] | None,
    finish: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the merged model: every adapted weight changed exactly, everything else carried over byte for byte.

    One argument is enough for a DCFT checkpoint, which holds its own base. Several adapters, each with a name, are
    combined in delta space: merge BASE a=DIR b=DIR --weight a=0.7 --weight b=0.3 --combine ties --density 0.5.
    """
    from .checkpoint import resolve
    from .merging import merge as merge_one

    started = time.perf_counter()
    stated = stated_recipe(inputs)
    base, adapter = _pair(inputs) if stated is None else (stated[0] or stated[1].base, "")
    source = resolve(base if base is not None else adapter)
    total = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    if stated is not None:
        from .combining import combine

        run: Callable[..., dict[str, Any]] = partial(combine, stated[1], output, base)
    else:
        run = partial(merge_one, base, adapter, output, base_kind=base_kind, options=_options(alpha, ranknum))
    with progress_bar("merging", total, quiet or as_json) as progress:
        content = run(
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
            link=link,
            hashes=hashes,
            keep_preimage=keep_preimage,
            keep_partial=keep_partial,
            part=part,
            finish=finish,
            vram=vram,
        )
    if part is not None and not as_json and not dry_run:
        seconds = time.perf_counter() - started
        click.echo(f"{output}: part {content['part']}, {len(content['files'])} files in {seconds:.1f} s")
        say("when all parts are made: the same command with --finish instead of --shards", quiet=quiet)
        return
    _done(content, output, started, as_json, quiet)


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="BASE ADAPTER")
@output_option
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="Of the deltas.")
@adapter_options
@device_option
@dry_run_option
@report_options
def delta(
    inputs: tuple[str, ...],
    output: str,
    overwrite: bool,
    dtype: str,
    base_kind: str | None,
    alpha: float | None,
    ranknum: float | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the dense delta of every adapted weight, W' - W0, to OUTPUT/delta.safetensors."""
    from .merging import delta as run

    base, adapter = _pair(inputs)
    started = time.perf_counter()
    content = run(
        base,
        adapter,
        output,
        device=device,
        dtype=dtype,
        base_kind=base_kind,
        options=_options(alpha, ranknum),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    _done(content, output, started, as_json, quiet)
    if content["not_included"]:
        say(f"not weight deltas, so not in it: {', '.join(content['not_included'])}", quiet=quiet)


@click.command()
@click.argument("inputs", nargs=-1, metavar="[BASE] ADAPTER | BASE NAME=ADAPTER...")
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
    overwrite: bool,
    rank: str | None,
    budget: float | None,
    scale: str,
    calibrate: Path | None,
    end_to_end: bool,
    prompts: Path | None,
    max_error: float | None,
    base_kind: str | None,
    alpha: float | None,
    ranknum: float | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write LoRA-equivalent factors as a PEFT folder, exact unless --rank is given.

    DCFT, LoRA and PiSSA become a plain LoRA. DoRA and DuDe become a DoRA on the original base plus its row scales.
    BASE may be left out where no base weight is needed (DCFT, LoRA). Several named adapters give the factors of their
    combination: exact for linear, truncated to --rank for the rest.
    """
    from .factors import factor as run
    from .factors import parse_rank, read_prompts

    started = time.perf_counter()
    stated = stated_recipe(inputs)
    if stated is not None:
        if budget is not None or calibrate is not None or end_to_end or prompts or max_error or scale == "exact":
            raise click.UsageError("of a combination, factor takes --rank only")
        from .combining import combine_factors

        content = combine_factors(
            stated[1],
            output,
            stated[0],
            rank=parse_rank(rank) if rank is not None else None,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        _done(content, output, started, as_json, quiet)
        if not as_json and not dry_run:
            errors = [layer["relative_error"] for layer in content["layers"].values()]
            click.echo(f"  {content['form']} of {len(errors)} weights; relative error of dW at most {max(errors):.2g}")
        return
    base, adapter = _pair(inputs)
    content = run(
        base,
        adapter,
        output,
        rank=parse_rank(rank) if rank is not None else None,
        budget=budget,
        keep_scale=scale == "exact",
        calibrate=calibrate,
        end_to_end=end_to_end,
        prompts=read_prompts(prompts) if prompts is not None else None,
        max_error=max_error,
        device=device,
        base_kind=base_kind,
        options=_options(alpha, ranknum),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    _done(content, output, started, as_json, quiet)
    if not as_json and not dry_run:
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
