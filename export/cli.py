"""The commands export and generate, which write and run ONNX models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from adapter_merge.cli.console import emit, say
from adapter_merge.cli.inputs import combination_options, has_combination, stated_inputs
from adapter_merge.cli.options import dry_run_option, report_options
from adapter_merge.errors import InputError


@click.command()
@click.argument("base", metavar="BASE | ONNX_DIR")
@click.argument("adapters", nargs=-1, metavar="[NAME=ADAPTER]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write; must not exist.")
@click.option(
    "--mode",
    type=click.Choice(["merged", "switchable", "batched"]),
    default="merged",
    show_default=True,
    help="merged: adapters, or none, in the weights. switchable: one graph, adapters chosen at run time. "
    "batched: another adapter for every sequence of a batch.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int4"]),
    default="fp32",
    show_default=True,
    help="Of the weights. int4: blocks of 32, after merging; factors of switchable adapters stay in float.",
)
@click.option("--device", default="cpu", show_default=True, help="What the model is built for: cpu or cuda.")
@click.option(
    "--add", multiple=True, metavar="NAME=ADAPTER", help="Add an adapter to the switchable or batched ONNX_DIR."
)
@click.option("--base", "base_folder", help="With --add: the base, where it is not where it was.")
@click.option("--overwrite", is_flag=True, help="Replace an output (with --add: an adapter) of that name.")
@click.option("--no-check", is_flag=True, help="Do not compare the export with the live model before it gets its name.")
@combination_options
@dry_run_option
@report_options
def export(
    base: str,
    adapters: tuple[str, ...],
    output: Path | None,
    mode: str,
    precision: str,
    device: str,
    add: tuple[str, ...],
    base_folder: str | None,
    overwrite: bool,
    no_check: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Export BASE with its adapters to ONNX, for onnxruntime and onnxruntime-genai.

    Decoders: Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 1 to 3, GPT-2. Classifiers: BERT, RoBERTa, DeBERTa-v2.

    \b
    adapter-merge export BASE de=./german -o out
    adapter-merge export BASE de=./german fr=./french -o out --mode switchable
    adapter-merge export BASE de=./german fr=./french --weight de=0.7 --combine ties -o out
    adapter-merge export out --add it=./italian
    """
    from .adapter_source import parse_adapters

    recipe: Any = stated_inputs((base, *adapters)).adapter if has_combination() else None
    if add:
        if adapters or output is not None or recipe is not None:
            raise InputError(
                "--add takes the export's folder and nothing else", hint="export ONNX_DIR --add NAME=ADAPTER"
            )
        from .adding import add_adapters

        report = add_adapters(
            Path(base),
            parse_adapters(add),
            base=base_folder,
            overwrite=overwrite,
            dry_run=dry_run,
            check=not no_check,
            say=lambda text: say(text, quiet=quiet),
        )
    else:
        if output is None:
            raise InputError("no output was named", hint="-o FOLDER")
        if base_folder is not None:
            raise InputError("--base belongs to --add", hint="BASE is the first argument")
        from .exporting import export_model

        named = parse_adapters(adapters)
        if recipe is not None and not named:  # a recipe's file names them
            named = parse_adapters(tuple(f"{item.name}={item.path}" for item in recipe.ingredients))
        if not dry_run:
            say(f"exporting {base} ({mode}, {precision})", quiet=quiet)
        report = export_model(
            base,
            named,
            output,
            mode=mode,
            precision=precision,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            recipe=recipe,
            check=not no_check,
            say=lambda text: say(text, quiet=quiet),
        )
    if as_json:
        emit(report)
        return
    for line in describe(report):
        click.echo(line)


def describe(report: dict[str, Any]) -> list[str]:
    """Print a summary of an export."""
    if report.get("dry_run"):
        what = f"add to {report['output']}" if "output" in report else f"export {report['base']}"
        lines = [f"would {what} ({report['mode']}, {report['precision']})"]
    else:
        lines = [f"{report['output']}: {report['mode']}, {report['seconds']} s"]
    for name, entry in report["adapters"].items():
        parts = []
        if "max_rank" in entry:
            parts.append(f"{entry['linears']} linears, rank {entry['max_rank']}")
        if entry.get("row_scaled"):
            parts.append(f"{entry['row_scaled']} row scales")
        if entry.get("replaced"):
            parts.append(f"{entry['replaced']} replaced tensors")
        size = report.get("adapter_bytes", {}).get(name)
        if size is not None:
            parts.append(f"{size / 1e6:.2f} MB")
        lines.append(f"  {name}: {', '.join(parts) or entry['source']}")
    for name, entry in report.get("parity", {}).items():
        lines.append(
            f"  checked {name}: max |dlogit| {entry['max_difference']:.2g}, "
            f"{entry['greedy_equal']} of {entry['greedy_total']} greedy tokens equal"
        )
    return lines


@click.command()
@click.argument("folder", metavar="ONNX_DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to answer; - reads standard input.")
@click.option("--system", help="A system message.")
@click.option("--adapter", "adapters", multiple=True, help="Repeat it to compare; 'base' is the model without any.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--seed", type=int)
@click.option("--raw", is_flag=True, help="Without the chat template.")
@click.option("--engine", type=click.Choice(["auto", "genai", "onnxruntime"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of onnxruntime on the CPU.")
@report_options
def generate(
    folder: Path,
    prompt: str,
    system: str | None,
    adapters: tuple[str, ...],
    device: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    raw: bool,
    engine: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Answer PROMPT with the export in ONNX_DIR, streaming; with several --adapter, once for each."""
    from dataclasses import asdict

    from . import generation
    from .prompting import Sampling

    if prompt == "-":
        prompt = sys.stdin.read()
    together = len(adapters) > 1
    at_once = together and batched(folder)  # streams of one batch would interleave
    last: list[str] = []

    def show(adapter: str, text: str) -> None:
        if as_json or at_once or not text:
            return
        if together and last[-1:] != [adapter]:
            click.echo(("\n" if last else "") + f"[{adapter}] ", nl=False)
            last.append(adapter)
        click.echo(text, nl=False)

    answers = generation.generate(
        folder,
        prompt,
        adapters,
        device=device,
        system=system,
        raw=raw,
        sampling=Sampling(max_tokens, temperature, top_p, seed),
        engine=engine,
        threads=threads,
        show=show,
    )
    if as_json:
        emit({"answers": [{**asdict(answer), "tokens_per_second": answer.tokens_per_second} for answer in answers]})
        return
    if at_once:
        for answer in answers:
            click.echo(f"[{answer.adapter}] {answer.text}")
    else:
        click.echo()
    for answer in answers:
        say(
            f"{answer.adapter}: {answer.tokens} tokens, prefill {answer.prefill_seconds * 1e3:.0f} ms, "
            f"decode {answer.tokens_per_second:.1f} tokens/s ({answer.engine})",
            quiet=quiet,
        )


def batched(folder: Path) -> bool:
    """Return True for an export that gives all answers at once."""
    from .folder import read_export

    return read_export(folder).mode == "batched"
