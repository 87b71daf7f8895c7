"""adapter-merge extract: write the LoRA between two checkpoints."""

from __future__ import annotations

import time

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.input_checks import check_paths
from adapter_merge.cli.options.shared import device_option, dry_run_option, output_argument, report_options
from adapter_merge.cli.options.values import RANK, SOURCE
from adapter_merge.cli.printing.console import emit
from adapter_merge.cli.printing.progress import working


@command(examples=["./base ./finetuned --rank 32 -o ./lora", "./base ./finetuned --rank 0.99 --row-scale -o ./dora"])
@click.argument("base", type=SOURCE)
@click.argument("finetuned", type=SOURCE)
@output_argument
@option(
    "--rank",
    type=RANK,
    metavar="RANK|ENERGY",
    default="16",
    show_default=True,
    help="A rank (16), or the energy that each weight keeps (0.99).",
)
@option("--row-scale", is_flag=True, help="Write a DoRA: its row scales fit changed magnitudes of rows better.")
@device_option
@dry_run_option
@report_options
def extract(
    base: str,
    finetuned: str,
    output: str,
    overwrite: bool,
    rank: int | float,
    row_scale: bool,
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a LoRA that approximates FINETUNED on BASE, with its error per weight."""
    started = time.perf_counter()
    check_paths(base, finetuned)
    with working(f"extracting from {finetuned}", quiet) as progress:
        from adapter_merge.api.extract import extract as run
        from adapter_merge.api.extract import worst_error
        from adapter_merge.api.options import ExtractOptions
        from adapter_merge.storage.checkpoint import open_checkpoint

        progress.begin("extracting", open_checkpoint(finetuned).nbytes)
        options = ExtractOptions(rank=rank, row_scale=row_scale, device=device, overwrite=overwrite, dry_run=dry_run)
        result = run(base, finetuned, output, options, progress=progress.advance)
    content = result.as_json()
    if as_json:
        emit(content)
    elif dry_run:
        click.echo(f"would write {output}: an adapter of rank {rank} from {finetuned}")
    else:
        ranks = sorted({layer["rank"] for layer in content["layers"].values()})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} .. {ranks[-1]}"
        seconds = time.perf_counter() - started
        click.echo(f"{output}: {content['form']} of {len(content['layers'])} weights, rank {span}, in {seconds:.1f} s")
        click.echo(f"  relative error of dW at most {worst_error(content):.2g}")
        if content["carried_over"]:
            click.echo(f"  copied in full: {', '.join(content['carried_over'][:8])}")
