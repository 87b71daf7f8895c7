"""adapter-merge factor: write low-rank factors as a PEFT folder or a GGUF file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.hub import push_options
from adapter_merge.cli.options.inputs import INPUTS, adapter_bytes, combination_options, stated_inputs
from adapter_merge.cli.options.shared import device_option, dry_run_option, output_option, report_options
from adapter_merge.cli.options.stated_settings import adapter_options, take_written_format
from adapter_merge.cli.options.values import RANK, SOURCE, stated_prompts
from adapter_merge.cli.printing.console import loading
from adapter_merge.cli.printing.progress import working
from adapter_merge.cli.printing.result import show_result


@command(
    examples=[
        "./base ./dude -o ./factors",
        "./base ./dude --rank 16 -o ./lora",
        "./dcft -o ./lora.gguf-folder --format gguf",
    ]
)
@click.argument("inputs", type=SOURCE, nargs=-1, metavar=f"[BASE] ADAPTER | {INPUTS}")
@output_option
@option(
    "--rank",
    type=RANK,
    metavar="RANK|ENERGY",
    help="Truncate to a plain LoRA of this rank (16), or with this energy (0.99); states its error.",
)
@option("--budget", type=float, help="MB for all factors together; the ranks are chosen to minimise the error.")
@option(
    "--scale",
    type=click.Choice(["fold", "exact"]),
    default="fold",
    show_default=True,
    help="With --rank or --budget: fold DoRA's row scale into the plain LoRA, or keep it exact.",
)
@option(
    "--calibrate",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A text file: minimise the error of the layers' outputs on it, not that of the weights.",
)
@option("--end-to-end", is_flag=True, help="Compare the logits with the adapter as trained, on built-in prompts.")
@option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT|@FILE",
    help="--end-to-end: a prompt, or a file with one prompt per line.",
)
@option("--prompts", "prompt_file", type=click.Path(path_type=Path, dir_okay=False), hidden=True)
@option("--max-error", type=float, help="Fail where a weight's relative error of dW is above this.")
@combination_options
@adapter_options
@device_option
@dry_run_option
@push_options
@report_options
def factor(
    inputs: tuple[str, ...],
    output: str,
    scale: str,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Write low-rank factors as a PEFT folder: exact, or truncated with --rank or --budget.

    DCFT, LoRA and PiSSA become a plain LoRA. DoRA and DuDe become a DoRA on the original base plus its row scales. BASE
    may be left out where no base weight is needed (DCFT, LoRA). --format gguf writes a LoRA adapter for llama.cpp
    instead of a PEFT folder; DoRA and DuDe then need --rank. For several named adapters the factors of their
    combination are written: exact for linear, truncated to --rank for other methods.
    """
    started = time.perf_counter()
    written = take_written_format()
    texts = stated_prompts((*prompts, f"@{prompt_file}") if prompt_file is not None else prompts)
    subject = stated_inputs(inputs)
    with working("factors", quiet) as progress:
        with loading():
            from adapter_merge.api.factor import factor as run
            from adapter_merge.api.options import FactorOptions

        options = FactorOptions(
            format=written,
            keep_scale=scale == "exact",
            prompts=texts,
            base_kind=subject.base_kind,
            reading=subject.options,
            **settings,
        )
        progress.begin("factors", adapter_bytes(subject))
        result = run(subject.base, subject.adapter, output, options, progress=progress.advance)
    show_result(result, output, started, as_json, quiet)
    if not as_json and not settings["dry_run"]:
        _show_certificate(result.as_json())


def _show_certificate(content: dict[str, Any]) -> None:
    """Print the factors' form, ranks and errors."""
    certificate = content["certificate"]
    low, high = certificate["ranks"]
    span = str(low) if low == high else f"{low} .. {high}"
    click.echo(
        f"  {content['form']}, rank {span}; relative error of dW at most {certificate['max_relative_error']:.2g}, "
        f"mean {certificate['mean_relative_error']:.2g}; energy kept {certificate['mean_energy']:.4%}"
    )
    end = certificate.get("end_to_end")
    if end is not None:
        click.echo(
            f"  end to end: |dlogit| at most {end['max_dlogit']:.2g}, mean {end['mean_dlogit']:.2g}; "
            f"KL {end['mean_kl']:.2g}; {end['greedy_equal']} of {end['greedy_total']} greedy tokens equal"
        )
