"""adapter-merge completion: shell completion of commands, options and paths."""

from __future__ import annotations

from pathlib import Path

import click

from adapter_merge.cli.options.command import command, option
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.printing.console import emit, say

SHELLS = ("bash", "zsh", "fish")
VARIABLE, PROGRAM = "_ADAPTER_MERGE_COMPLETE", "adapter-merge"


@command(examples=["bash --install", "zsh > ~/.zfunc/_adapter-merge"])
@click.argument("shell", type=click.Choice(SHELLS))
@option("--install", is_flag=True, help="Write the script to this user's folder of completions, and print its path.")
@report_options
def completion(shell: str, install: bool, as_json: bool, quiet: bool) -> None:
    """Print the completion script of SHELL, or install it.

    bash needs the package bash-completion 2, zsh needs ~/.zfunc in fpath before compinit, fish needs no setup.
    """
    from click.shell_completion import get_completion_class

    from .main import group

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(group, {}, PROGRAM, VARIABLE).source()
    if not install:
        if as_json:
            emit({"shell": shell, "script": script})
        else:
            click.echo(script)
        return
    file = completion_file(shell)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script, encoding="utf-8")
    if as_json:
        emit({"shell": shell, "file": str(file)})
    say(f"{file}: written; start a new {shell} to use it", quiet=quiet)


def completion_file(shell: str) -> Path:
    """Return the file in which `shell` looks for a user's completion of this program."""
    home = Path.home()
    return {
        "bash": home / ".local/share/bash-completion/completions" / PROGRAM,
        "zsh": home / ".zfunc" / f"_{PROGRAM}",
        "fish": home / ".config/fish/completions" / f"{PROGRAM}.fish",
    }[shell]
