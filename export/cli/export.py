"""adapter-merge export: write an ONNX model with adapters merged, switchable or batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapter_merge.cli.options.command import ENGINE, OUTPUT, OutputOption, command, option
from adapter_merge.cli.options.hub import add_revision, push_options
from adapter_merge.cli.options.input_checks import check_paths
from adapter_merge.cli.options.inputs import combination_options, has_combination, named_inputs, stated_inputs
from adapter_merge.cli.options.shared import dry_run_option, report_options
from adapter_merge.cli.options.stated_settings import adapter_options, has_stated, stated_arguments
from adapter_merge.cli.options.values import DEVICE, SOURCE, Dtype
from adapter_merge.cli.printing.console import emit, say
from adapter_merge.cli.printing.progress import working

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


@command(
    examples=[
        "BASE ./german -o out",
        "BASE de=./german fr=./french -o out --mode switchable",
        "BASE de=./german fr=./french --weight de=0.7 --combine ties -o out",
        "out --add it=./italian",
    ]
)
@click.argument("base", type=SOURCE, metavar="BASE | ONNX_DIR")
@click.argument("adapters", type=SOURCE, nargs=-1, metavar="[[NAME=]ADAPTER]...")
@option(
    "-o",
    "--output",
    cls=OutputOption,
    needed=False,
    section=OUTPUT,
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="The folder to write; must not exist. May be the last argument, without -o.",
)
@option(
    "--mode",
    type=click.Choice(["merged", "switchable", "batched"]),
    default="merged",
    show_default=True,
    help="merged: adapters, or none, in the weights. switchable: one graph, adapters chosen at run time. "
    "batched: another adapter for every sequence of a batch.",
)
@option(
    "--dtype",
    old=("--precision",),
    type=Dtype(list(PRECISIONS)),
    default="float32",
    show_default=True,
    help="Of the weights. int4 (decoders): blocks of 32, after merging. int8 (encoders): onnxruntime's dynamic "
    "quantisation. Factors of switchable adapters stay in float.",
)
@option(
    "--pooling",
    type=click.Choice(["mean", "cls", "max", "last", "none"]),
    help="Export an encoder as a sentence encoder; from its modules.json when not given. none: hidden states alone.",
)
@option("--normalize", is_flag=True, help="With --pooling: sentence embeddings of length 1.")
@option(
    "--device",
    type=DEVICE,
    metavar="DEVICE",
    default="cpu",
    show_default=True,
    section=ENGINE,
    help="What the model is built for: cpu or cuda.",
)
@option("--add", multiple=True, metavar="NAME=ADAPTER", help="Add an adapter to the switchable or batched ONNX_DIR.")
@option("--base", "base_folder", type=SOURCE, help="With --add: the base, where it is not where it was.")
@option("--overwrite", is_flag=True, section=OUTPUT, help="Replace an output (with --add: an adapter) of that name.")
@option("--no-check", is_flag=True, help="Do not compare the export with the live model before it gets its name.")
@combination_options
@adapter_options
@dry_run_option
@push_options
@report_options
def export(
    base: str,
    adapters: tuple[str, ...],
    output: Path | None,
    mode: str,
    dtype: str,
    pooling: str | None,
    normalize: bool,
    device: str,
    add: tuple[str, ...],
    base_folder: str | None,
    overwrite: bool,
    no_check: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export BASE with its adapters to ONNX, for onnxruntime and onnxruntime-genai.

    Decoders: Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 1 to 3, Granite, SmolLM3, GPT-2.
    Encoders: BERT, RoBERTa, XLM-R, MPNet, DistilBERT, ModernBERT, DeBERTa-v2, as sentence encoders, masked
    language models, classifiers of texts or tokens, and for answers in a text.
    An adapter without a name gets its folder's.
    """
    from adapter_merge.export.graph.adapter_source import parse_adapters

    precision = PRECISIONS[dtype]
    if add and (adapters or output is not None or has_combination() or has_stated()):
        raise click.UsageError("--add takes the export's folder and nothing else: export ONNX_DIR --add NAME=ADAPTER")
    if not add and output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if not add and base_folder is not None:
        raise click.UsageError("--base belongs to --add: BASE is the first argument")
    if has_stated() and mode != "merged":
        words = " ".join(stated_arguments())
        raise click.UsageError(
            f"--mode {mode} takes no {words}: write ADAPTER with adapter-merge convert {words} first"
        )
    texts = named_inputs(adapters)
    base = base if add else str(add_revision(base))
    recipe: Any = None
    if has_combination() or has_stated():
        recipe = stated_inputs((base, *texts)).adapter
    elif not add:
        check_paths(base, *(text.partition("=")[2] for text in texts))
    with working(f"exporting {base}", quiet) as progress:

        def show(text: str) -> None:
            progress.begin(text)
            say(text, quiet=quiet)

        if add:
            from adapter_merge.export.adding import add_adapters

            report = add_adapters(
                Path(base),
                parse_adapters(named_inputs(add)),
                base=base_folder,
                overwrite=overwrite,
                dry_run=dry_run,
                check=not no_check,
                say=show,
            )
        else:
            from adapter_merge.export.exporting import export_model

            named = parse_adapters(texts)
            if recipe is not None and not named:  # a recipe's file names them
                named = parse_adapters(tuple(f"{item.name}={item.path}" for item in recipe.ingredients))
            if not dry_run:
                show(f"exporting {base} ({mode}, {precision})")
            assert output is not None
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
                pooling=pooling,
                normalize=normalize,
                say=show,
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
        if entry.get("origin"):
            lines.append(f"    base: {entry['origin']}")
    for name, entry in report.get("parity", {}).items():
        lines.append(
            f"  checked {name}: max |dlogit| {entry['max_difference']:.2g}, "
            f"{entry['greedy_equal']} of {entry['greedy_total']} greedy tokens equal"
        )
    return lines
