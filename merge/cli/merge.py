"""adapter-merge merge: write a merged model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from adapter_merge.cli.options.command import OUTPUT, command, option
from adapter_merge.cli.options.hub import plan_files, push_options
from adapter_merge.cli.options.inputs import INPUTS, combination_options, stated_inputs
from adapter_merge.cli.options.shared import (
    device_option,
    dry_run_option,
    engine_options,
    output_option,
    ray_option,
    report_options,
)
from adapter_merge.cli.options.stated_settings import adapter_options
from adapter_merge.cli.options.values import DTYPES, SHARE, SIZE, SOURCE
from adapter_merge.cli.printing.console import loading, say
from adapter_merge.cli.printing.progress import working
from adapter_merge.cli.printing.result import show_result


@command(
    examples=[
        "./base ./adapter -o ./merged",
        "org/model org/adapter@v1 ./merged",
        "./base a=./one b=./two --weight a=0.7 --combine ties --density 0.5 -o ./merged",
    ]
)
@click.argument("inputs", type=SOURCE, nargs=-1, metavar=INPUTS)
@output_option
@option("--dtype", type=DTYPES, help="Dtype of all float tensors of the output; default: that of each tensor in BASE.")
@option(
    "--as",
    "write_as",
    type=click.Choice(["bfloat16", "float16", "float32", "same"]),
    help="Quantised BASE: the dtype in which its quantised weights are written, dequantised and rounded once; or same: "
    "adapted weights are quantised again in BASE's scheme, and the share of the change that is kept is measured.",
)
@option(
    "--min-retention",
    type=SHARE,
    default=0.5,
    show_default=True,
    help="--as same: fail where less than this share of the adapter's change is kept.",
)
@option(
    "--texts",
    "text_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="--as same: a file with a text per line, to measure the KL divergence to the unmerged adapter.",
)
@option(
    "--max-shard-size",
    "max_shard_bytes",
    type=SIZE,
    metavar="SIZE",
    section=OUTPUT,
    help="Size of one weights file of the output, at most; default: the files of BASE.",
)
@ray_option
@engine_options
@combination_options
@adapter_options
@device_option
@dry_run_option
@push_options
@report_options
def merge(
    inputs: tuple[str, ...], output: str, as_json: bool, quiet: bool, text_file: Path | None, **settings: Any
) -> None:
    """Write the merged model: adapted weights are computed, everything else is copied byte for byte.

    A DCFT checkpoint needs no BASE, because it holds its own. Several adapters with names are combined in delta space:
    merge BASE a=DIR b=DIR --weight a=0.7 --weight b=0.3 --combine ties --density 0.5. Without
    names they are applied in turn: merge BASE FIRST SECOND, where SECOND was trained on BASE with FIRST merged.
    """
    started = time.perf_counter()
    subject = stated_inputs(inputs)
    if not isinstance(subject.adapter, str) and settings["dtype"] is None:
        settings["dtype"] = subject.adapter.dtype
    from adapter_merge.storage.checkpoint import resolve_base

    source = resolve_base(subject.folder) if subject.folder else Path()
    files = source.iterdir() if source.is_dir() else (source,)
    total = sum(path.stat().st_size for path in files if path.is_file())
    with working("merging", quiet) as progress:
        with loading():
            from adapter_merge.api.merge import merge as run
            from adapter_merge.api.options import MergeOptions, read_prompts

        progress.begin("merging", total)
        texts = None if text_file is None else read_prompts(text_file)
        options = MergeOptions(base_kind=subject.base_kind, reading=subject.options, texts=texts, **settings)
        result = run(subject.base, subject.adapter, output, options, progress=progress.advance)
    if settings["part"] is not None and not as_json and not settings["dry_run"]:
        seconds = time.perf_counter() - started
        click.echo(f"{output}: part {result.part}, {len(result.files)} files in {seconds:.1f} s")
        say("once all parts are written, run the same command with --finish instead of --shards", quiet=quiet)
        return
    plan_files(result.as_json().get("planned", []))
    show_result(result, output, started, as_json, quiet)
