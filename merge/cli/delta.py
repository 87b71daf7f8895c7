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
        from adapter_merge.api.merge import delta as run
        from adapter_merge.outputs.staging import MANIFEST

    started = time.perf_counter()
    base, adapter, base_kind, options = stated_inputs(inputs)
    content = run(base, adapter, output, base_kind=base_kind, options=options, **settings)
    show_result(content, output, started, as_json, quiet)
    changes = content["base_changes"]
    if changes["copies"]:
        count = len(changes["copies"])
        say(f"to be added to a base with {count} more tensors: base_changes in {output}/{MANIFEST}", quiet=quiet)
    if content["not_included"]:
        say(f"not weight deltas, so not in it: {', '.join(content['not_included'])}", quiet=quiet)
