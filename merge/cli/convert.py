"""adapter-merge convert: write any adapter file as a safe adapter folder."""

from __future__ import annotations

import time
from typing import Any

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.hub import add_revision, push_options
from adapter_merge.cli.options.shared import dry_run_option, output_argument, report_options
from adapter_merge.cli.options.stated_settings import adapter_options, read_single_stated
from adapter_merge.cli.options.values import SOURCE
from adapter_merge.cli.printing.progress import working
from adapter_merge.cli.printing.result import show_result


@command(examples=["./pickled-lora -o ./lora", "run/final.ckpt --alpha 16 -o ./adapter"])
@click.argument("checkpoint", type=SOURCE)
@output_argument
@option(
    "--base", type=SOURCE, help="The base; needed for DuDe of PEFT, and to find the trained heads of a DCFT checkpoint."
)
@adapter_options
@dry_run_option
@push_options
@report_options
def convert(checkpoint: str, output: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Write any adapter file as a safe adapter folder. Code in pickled files is never run."""
    from adapter_merge.api.convert import convert as run
    from adapter_merge.api.options import ConvertOptions

    started = time.perf_counter()
    settings["base"] = add_revision(settings["base"])
    base_kind, options = read_single_stated()
    with working(f"converting {checkpoint}", quiet):
        result = run(checkpoint, output, ConvertOptions(base_kind=base_kind, reading=options, **settings))
    show_result(result, output, started, as_json, quiet)
