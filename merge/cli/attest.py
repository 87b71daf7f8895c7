"""adapter-merge attest: the provenance of an output, as an in-toto statement."""

from __future__ import annotations

from pathlib import Path

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.values import SOURCE
from adapter_merge.cli.printing.console import emit, say


@command(examples=["./merged", "./merged -o provenance.json"])
@click.argument("artefact", type=SOURCE)
@option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file to write, which must not exist; default: stdout."
)
@report_options
def attest(artefact: str, output: Path | None, as_json: bool, quiet: bool) -> None:
    """Print the provenance of ARTEFACT (SLSA v1, an in-toto statement) from its manifest, after hashing every file.

    The statement is not signed. Sign it with another tool, or sign ARTEFACT itself (see verify --signature).
    """
    from adapter_merge.errors import OutputError
    from adapter_merge.outputs.attestation import attest as run
    from adapter_merge.outputs.staging import disk_errors, write_json
    from adapter_merge.storage.checkpoint import resolve

    folder = resolve(artefact)
    if output is not None:
        if output.exists():
            raise OutputError(f"{output}: exists already", hint="choose another --output")
        if folder.resolve() in output.resolve().parents:
            raise OutputError(f"{output}: is inside {folder}, whose files must not change")
    statement = run(folder)
    if output is None:
        emit(statement)
        return
    with disk_errors(output):
        write_json(output, statement)
    say(f"{output}: {len(statement['subject'])} files of {folder}", quiet=quiet)
