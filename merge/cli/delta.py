"""adapter-merge delta: write dense weight deltas."""

from __future__ import annotations

import time
from typing import Any

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.hub import hub_options
from adapter_merge.cli.options.inputs import INPUTS, combination_options, stated_inputs
from adapter_merge.cli.options.shared import (
    device_option,
    dry_run_option,
    output_option,
    ray_option,
    report_options,
)
from adapter_merge.cli.options.stated_settings import adapter_options
from adapter_merge.cli.options.values import DTYPES, SOURCE
from adapter_merge.cli.printing.console import loading, say
from adapter_merge.cli.printing.progress import working
from adapter_merge.cli.printing.result import show_result


@command(examples=["./base ./adapter -o ./delta", "./base a=./one b=./two --combine ties --density 0.5 -o ./delta"])
@click.argument("inputs", type=SOURCE, nargs=-1, metavar=INPUTS)
@output_option
@option("--dtype", type=DTYPES, default="float32", show_default=True, help="Dtype of the deltas.")
@combination_options
@adapter_options
@device_option
@ray_option
@dry_run_option
@hub_options
@report_options
def delta(inputs: tuple[str, ...], output: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Write the dense delta of every adapted weight, W' - W0, to OUTPUT/delta.safetensors.

    For several adapters, stated as for merge, it is the delta of their combination.
    """
    started = time.perf_counter()
    subject = stated_inputs(inputs)
    with working("deltas", quiet):
        with loading():
            from adapter_merge.api.delta import delta as run
            from adapter_merge.api.options import DeltaOptions
            from adapter_merge.outputs.manifest import MANIFEST

        options = DeltaOptions(base_kind=subject.base_kind, reading=subject.options, **settings)
        result = run(subject.base, subject.adapter, output, options)
    show_result(result, output, started, as_json, quiet)
    changes = result.as_json()["base_changes"]
    if changes["copies"]:
        count = len(changes["copies"])
        say(
            f"note: the base needs {count} more tensors, see base_changes in {output}/{MANIFEST}",
            quiet=quiet,
        )
    if result.not_included:
        say(
            f"note: replaced in full, so without deltas: {', '.join(result.not_included)}",
            quiet=quiet,
        )
