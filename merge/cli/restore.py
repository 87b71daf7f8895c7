"""adapter-merge restore: write the base of a merged model, bit for bit."""

from __future__ import annotations

import time

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.shared import dry_run_option, link_option, output_argument, report_options
from adapter_merge.cli.options.values import SOURCE
from adapter_merge.cli.printing.console import emit
from adapter_merge.cli.printing.progress import working


@command(examples=["./merged -o ./base", "./merged --base ./the-base -o ./again"])
@click.argument("merged", type=SOURCE)
@output_argument
@option("--base", type=SOURCE, help="The original base; not needed where MERGED was written with --keep-preimage.")
@link_option("How the files of --base are written; auto: reflink where the file system supports it, else copy.")
@dry_run_option
@report_options
def restore(
    merged: str, output: str, overwrite: bool, base: str | None, link: str, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Write the base of MERGED again, bit for bit, and check it against the hashes in the manifest."""
    from adapter_merge.api.options import RestoreOptions
    from adapter_merge.api.restore import restore as run
    from adapter_merge.outputs.manifest import read_manifest
    from adapter_merge.storage.checkpoint import resolve

    started = time.perf_counter()
    folder = resolve(merged)
    manifest = read_manifest(folder) or {}
    total = sum((folder / name).stat().st_size for name in manifest.get("files", {}) if (folder / name).is_file())
    with working("restoring", quiet) as progress:
        progress.begin("restoring", total)
        options = RestoreOptions(base=resolve(base) if base else None, link=link, overwrite=overwrite, dry_run=dry_run)
        files = run(folder, output, options, progress=progress.advance).files
    if as_json:
        emit({"output": output, "files": dict(files)} | ({"dry_run": True} if dry_run else {}))
    elif dry_run:
        click.echo(f"would write {output}: the base of {merged}, {len(files)} files")
    else:
        seconds = time.perf_counter() - started
        click.echo(f"{output}: the base of {merged}, {len(files)} files checked by sha256, in {seconds:.1f} s")
