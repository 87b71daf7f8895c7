"""adapter-merge convert: any adapter file as a safe adapter folder."""

from __future__ import annotations

import time
from typing import Any

import click

from .adapter_options import adapter_options, one_stated
from .options import dry_run_option, output_option, report_options
from .result import show_result


@click.command()
@click.argument("checkpoint")
@output_option
@click.option("--base", help="The base, where the adapter needs it (DuDe of PEFT; heads of a DCFT checkpoint).")
@adapter_options
@dry_run_option
@report_options
def convert(checkpoint: str, output: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Write any adapter file (pickled ones included, without running their code) as a safe adapter folder."""
    from adapter_merge.api.convert import convert as run
    from adapter_merge.api.options import ConvertOptions

    started = time.perf_counter()
    base_kind, options = one_stated()
    result = run(checkpoint, output, ConvertOptions(base_kind=base_kind, reading=options, **settings))
    show_result(result, output, started, as_json, quiet)
