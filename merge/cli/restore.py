"""adapter-merge restore: the base of a merged model, bit for bit."""

from __future__ import annotations

import time

import click

from .console import emit, progress_bar
from .options import output_option, report_options


@click.command()
@click.argument("merged")
@output_option
@click.option("--base", help="The original base; not needed when MERGED was made with --keep-preimage.")
@click.option(
    "--link",
    type=click.Choice(["auto", "reflink", "hardlink", "copy"]),
    default="auto",
    show_default=True,
    help="How files of --base get into the output; auto: reflink where the file system can, else copy.",
)
@report_options
def restore(
    merged: str, output: str, overwrite: bool, base: str | None, link: str, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Write the base that MERGED was made from, bit for bit, and prove it against the manifest's hashes."""
    from adapter_merge.api.options import RestoreOptions
    from adapter_merge.api.restore import restore as run
    from adapter_merge.outputs.staging import read_manifest
    from adapter_merge.storage.checkpoint import resolve

    started = time.perf_counter()
    folder = resolve(merged)
    manifest = read_manifest(folder) or {}
    total = sum((folder / name).stat().st_size for name in manifest.get("files", {}) if (folder / name).is_file())
    with progress_bar("restoring", total, quiet or as_json) as progress:
        options = RestoreOptions(base=resolve(base) if base else None, link=link, overwrite=overwrite)
        files = run(folder, output, options, progress=progress).files
    if as_json:
        emit({"output": output, "files": dict(files)})
    else:
        seconds = time.perf_counter() - started
        click.echo(f"{output}: the base of {merged}, {len(files)} files proved by their sha256, in {seconds:.1f} s")
