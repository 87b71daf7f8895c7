"""adapter-merge delta: dense weight deltas."""

from __future__ import annotations

import time
from typing import Any

import click

from .adapter_options import adapter_options
from .console import loading, say
from .inputs import INPUTS, combination_options, stated_inputs
from .options import DTYPES, device_option, dry_run_option, output_option, report_options
from .result import show_result


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
        from adapter_merge.api.delta import delta as run
        from adapter_merge.api.options import DeltaOptions
        from adapter_merge.outputs.staging import MANIFEST

    started = time.perf_counter()
    subject = stated_inputs(inputs)
    options = DeltaOptions(base_kind=subject.base_kind, reading=subject.options, **settings)
    result = run(subject.base, subject.adapter, output, options)
    show_result(result, output, started, as_json, quiet)
    changes = result.as_json()["base_changes"]
    if changes["copies"]:
        count = len(changes["copies"])
        say(f"to be added to a base with {count} more tensors: base_changes in {output}/{MANIFEST}", quiet=quiet)
    if result.not_included:
        say(f"not weight deltas, so not in it: {', '.join(result.not_included)}", quiet=quiet)
