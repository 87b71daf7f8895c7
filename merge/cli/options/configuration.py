"""Defaults of options from a file: --config FILE, ADAPTER_MERGE_CONFIG, or config.toml in the user's configuration.

    device = "cpu"           # for every command that has --device
    [merge]
    max-shard-size = "5GB"   # for merge

The command line and environment variables take precedence. The working directory is not searched, because a folder
from another author must not change how a command behaves.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click

META = "adapter_merge.configuration"
# Options that may be outside of a command's table: they have the same meaning in every command that has them.
COMMON = ("device", "overwrite", "dry-run", "quiet", "verbose", "json", "log-level", "color", "token", "public")


def user_file() -> Path:
    """Return the path of the user's configuration file, which need not exist."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "adapter-merge" / "config.toml"


def read_configuration(file: Path | None) -> dict[str, Any]:
    """Read `file`, or the user's configuration file where it exists. Raises UsageError for a file that is not TOML."""
    source = file or user_file()
    if file is None and not source.is_file():
        return {}
    import tomllib

    try:
        return tomllib.loads(source.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{source}: not a TOML configuration ({error})") from error


def check_names(content: Mapping[str, Any], commands: Collection[str]) -> None:
    """Raise UsageError for a table that names no command, and for an option outside of tables that is not in COMMON."""
    for key, value in content.items():
        if isinstance(value, dict) and key not in commands:
            raise click.UsageError(f"the configuration has a table [{key}], but no command has that name")
        if not isinstance(value, dict) and key not in COMMON:
            raise click.UsageError(
                f"the configuration's {key} must be in a command's table; options for all commands: {', '.join(COMMON)}"
            )


def defaults_of(ctx: click.Context) -> dict[str, Any]:
    """Return the configured defaults of the running command by parameter name. Raises UsageError for unknown keys."""
    content = ctx.meta.get(META, {})
    names = {
        flag.lstrip("-"): parameter.name
        for parameter in ctx.command.params
        for flag in parameter.opts
        if isinstance(parameter, click.Option) and flag.startswith("--") and parameter.name is not None
    }
    own = content.get(ctx.info_name, {})
    unknown = sorted(own.keys() - names.keys())
    if unknown:
        raise click.UsageError(f"the configuration's [{ctx.info_name}] has no such option: {', '.join(unknown)}", ctx)
    common = {key: value for key, value in content.items() if not isinstance(value, dict) and key in names}
    return {names[key]: value for key, value in {**common, **own}.items()}
