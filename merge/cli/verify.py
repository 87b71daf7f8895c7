"""adapter-merge verify: check that an artefact computes what the adapter was trained to compute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.hub import hub_options
from adapter_merge.cli.options.inputs import INPUTS, Subject, combination_options, has_combination, stated_inputs
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.stated_settings import adapter_options
from adapter_merge.cli.options.values import DTYPES, SHARE, SOURCE, stated_prompts
from adapter_merge.cli.printing.console import emit, say
from adapter_merge.cli.printing.progress import working

from .verify_server import verify_running


def _verify_hashes(folder: str, inputs: bool, public_key: Path | None, as_json: bool, quiet: bool) -> None:
    """Check the hash of every file of an output against its manifest, and print the result."""
    from dataclasses import asdict

    from adapter_merge.outputs.integrity import check_integrity
    from adapter_merge.outputs.unlisted_files import SIGNATURE

    total = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    with working("hashing", quiet) as progress:
        progress.begin("hashing", total)
        integrity = check_integrity(folder, inputs=inputs, public_key=public_key, progress=progress.advance)
    if as_json:
        emit(asdict(integrity) | {"folder": folder, "passed": True})
        return
    if integrity.signed:
        author = f"signed by the owner of {public_key}"
    elif SIGNATURE in integrity.beside:
        author = "its signature was not checked: --signature --public-key FILE"
    else:
        author = "not signed: its author is unknown"
    click.echo(
        f"{folder}: {integrity.files} files, {integrity.nbytes / 1e6:.1f} MB, unchanged since written ({author})"
    )
    if inputs:
        click.echo(f"  {integrity.inputs} files of base and adapters are unchanged since the output was written")
        for name in integrity.moved:
            click.echo(f"  does not exist any more, not checked: {name}")
    for name in integrity.changed:
        click.echo(f"  changed since the output was written: {name}")
    for name in integrity.beside:
        if name != SIGNATURE:
            click.echo(f"  not in the manifest, not checked: {name}")


def _verify_restored(merged: str, restored: str, as_json: bool) -> None:
    """Check that `restored` is the base of `merged`, and print the result."""
    from adapter_merge.outputs.integrity import check_restored

    count = check_restored(merged, restored)
    if as_json:
        emit({"folder": restored, "merged": merged, "files": count, "passed": True})
    else:
        click.echo(f"{restored}: {count} files are, bit for bit, those of the base of {merged}")


@command(
    examples=[
        "./merged                          # is unchanged since it was written",
        "./base ./adapter ./merged         # computes what the adapter was trained to compute",
        "./base ./adapter --server http://localhost:8000 --model german",
    ]
)
@click.argument("inputs", type=SOURCE, nargs=-1, metavar=f"[{INPUTS}] ARTEFACT")
@combination_options
@adapter_options
@option(
    "--inputs", "check_inputs", is_flag=True, help="ARTEFACT alone: also check the hashes of its base and adapters."
)
@option("--signature", is_flag=True, help="ARTEFACT alone: check its signature, model.sig, with --public-key.")
@option(
    "--public-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="--signature: the public key of the signer, PEM.",
)
@option("--trained", is_flag=True, help="ARTEFACT alone: compare with the base and adapters of its manifest.")
@option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT|@FILE",
    help="A prompt to compare on, or a file with one prompt per line.",
)
@option(
    "--max-tokens",
    "generated",
    old=("--tokens",),
    default=32,
    show_default=True,
    type=click.IntRange(min=1),
    help="Greedy tokens per prompt.",
)
@option(
    "--tolerance", type=float, help="Largest |dlogit| that passes; default: 1e-4 in float32, none for half precision."
)
@option("--weights-only", is_flag=True, help="Compare only the weights, and run no model.")
@option(
    "--min-retention",
    type=SHARE,
    default=0.5,
    show_default=True,
    help="Model merged --as same: smallest share of the adapter's change that passes.",
)
@option("--server", metavar="URL", help="Compare a running OpenAI-compatible server instead of ARTEFACT.")
@option("--model", metavar="NAME", help="--server: the name under which it serves the adapter.")
@option("--api-key", envvar="ADAPTER_MERGE_API_KEY", help="--server: its API key; or set ADAPTER_MERGE_API_KEY.")
@option(
    "--dtype",
    type=DTYPES,
    help="--server: the dtype in which it computes; default: that of BASE.",
)
@hub_options
@report_options
def verify(
    inputs: tuple[str, ...],
    check_inputs: bool,
    signature: bool,
    public_key: Path | None,
    trained: bool,
    prompts: tuple[str, ...],
    server: str | None,
    model: str | None,
    api_key: str | None,
    dtype: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Check that ARTEFACT (merged model, factors, deltas, ONNX export) computes what ADAPTER was trained to compute.

    The adapter runs unmerged on BASE (PEFT for PEFT folders, the papers' formulas for DCFT and DuDe) and is compared
    with the artefact in float32: logits, greedy tokens, every weight. Exit code 1 where they differ. A DCFT checkpoint
    needs no BASE: CHECKPOINT ARTEFACT. Several adapters are stated as for merge: each runs on its own, and the deltas
    are combined by the method's formula.

    ARTEFACT alone: check that it is unchanged since it was written. Every file is hashed and compared with the
    manifest, and the folder may hold no other files. --signature --public-key FILE also checks who signed it. With
    --trained the base, adapters and recipe that the manifest names are checked to be unchanged, and compared as above.
    MERGED RESTORED: check that a folder is the base of MERGED.

    BASE ADAPTER --server URL --model NAME: compare the log-probabilities of a running server, of prompts and of the
    adapter's own answers, and its greedy tokens. It fails where the server ignores the adapter or serves another one.
    """
    from adapter_merge.outputs.integrity import inputs_of, is_merged
    from adapter_merge.storage.checkpoint import resolve

    texts = stated_prompts(prompts)
    if signature != (public_key is not None):
        raise click.UsageError("--signature needs --public-key FILE, and --public-key needs --signature")
    if signature and (server is not None or len(inputs) != 1 or trained or has_combination()):
        raise click.UsageError("--signature applies to an ARTEFACT alone")
    if server is not None:
        if trained or check_inputs or settings["weights_only"]:
            raise click.UsageError("--server excludes --trained, --inputs and --weights-only, which check an ARTEFACT")
        if model is None:
            raise click.UsageError("--server needs --model NAME, one of its models")
        if not inputs and not has_combination():
            raise click.UsageError(f"expected {INPUTS}")
        for unused in ("weights_only", "min_retention"):
            settings.pop(unused)
        served = {"url": server, "model": model, "api_key": api_key}
        verify_running(stated_inputs(inputs), served, as_json, quiet, prompts=texts, dtype=dtype, **settings)
        return
    if model is not None or dtype is not None:
        raise click.UsageError("--model and --dtype apply to a --server only")
    if not inputs:
        raise click.UsageError(f"expected [{INPUTS}] ARTEFACT")
    artefact = inputs[-1]
    combining = has_combination()
    if len(inputs) == 1 and not combining:
        folder = str(resolve(artefact))
        if not trained:
            _verify_hashes(folder, check_inputs, public_key, as_json, quiet)
            return
        subject = Subject(*inputs_of(folder))
    elif len(inputs) == 2 and not combining and is_merged(inputs[0]):
        _verify_restored(inputs[0], artefact, as_json)
        return
    else:
        subject = stated_inputs(inputs[:-1])
    total = sum(file.stat().st_size for file in resolve(artefact).glob("*.safetensors"))
    with working("verifying", quiet) as progress:
        from adapter_merge.api.options import VerifyOptions
        from adapter_merge.api.verify import verify as run

        def show(text: str) -> None:
            progress.begin(text)
            say(text, quiet=quiet or as_json)

        progress.begin("comparing weights", total)
        options = VerifyOptions(base_kind=subject.base_kind, reading=subject.options, prompts=texts, **settings)
        report = run(
            subject.base,
            subject.adapter,
            artefact,
            options,
            progress=progress.advance,
            say=show,
        ).as_json()
    if as_json:
        emit(report)
    else:
        _show_verdict(report)
    if not report["passed"]:
        sys.exit(1)


def _show_verdict(report: dict[str, Any]) -> None:
    """Print the figures of weights and logits, notes, problems, and PASS or FAIL."""
    layers = report.get("layers") or {}
    if layers:
        worst = max(layers, key=lambda name: layers[name]["relative_error"])
        error = layers[worst]["relative_error"]
        click.echo(f"weights  {len(layers)} compared; worst relative error of dW {error:.2g} ({worst})")
        if report.get("half_precision"):
            ulp = max(entry["excess_ulp"] for entry in layers.values())
            click.echo(f"         {report['half_precision']}: at most {ulp:.2g} ulp beyond one correct rounding")
        retentions = [entry["retention"] for entry in layers.values() if entry["retention"] is not None]
        if retentions:
            click.echo(
                f"         {len(retentions)} weights quantised again; "
                f"retention of dW {min(retentions):.2f} .. {max(retentions):.2f}"
            )
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
