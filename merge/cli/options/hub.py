"""Options of the hub: --push-to and its like of commands that write, --revision and --token of commands that read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from adapter_merge.cli.printing.console import say

from .command import HUB, STEPS, option

F = TypeVar("F", bound=Callable[..., Any])
META = "adapter_merge.hub"


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    ctx.meta.setdefault(META, {})[param.name] = value


def _keep_push(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    _keep(ctx, param, value)
    ctx.meta.setdefault(STEPS, []).append((check_push, push))


def _token(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        os.environ["HF_TOKEN"] = value  # where huggingface_hub looks first


def hub_options(function: F) -> F:
    """--revision and --token."""
    for decorate in (
        option(
            "--token",
            metavar="TOKEN",
            section=HUB,
            expose_value=False,
            callback=_token,
            help="For private repositories; better HF_TOKEN, or `hf auth login`, which no list of processes shows.",
        ),
        option(
            "--revision",
            metavar="REVISION",
            section=HUB,
            expose_value=False,
            callback=_keep,
            help="Branch, tag or commit of BASE, where it is a hub id; of any other input: org/name@REVISION.",
        ),
    ):
        function = decorate(function)
    return function


def push_options(function: F) -> F:
    """--push-to and --public, with --revision and --token. Carried out by Command.invoke."""
    for decorate in (
        option(
            "--public",
            is_flag=True,
            section=HUB,
            expose_value=False,
            callback=_keep,
            help="--push-to: a new repository is public, not private.",
        ),
        option(
            "--push-to",
            metavar="ORG/NAME",
            section=HUB,
            expose_value=False,
            callback=_keep_push,
            help="Upload the output, with its model card, to a new private repository.",
        ),
    ):
        function = decorate(function)
    return hub_options(function)


def revised(base: str | None) -> str | None:
    """Return BASE as org/name@REVISION where --revision is given. Raises UsageError for a folder."""
    revision = click.get_current_context().meta.get(META, {}).get("revision")
    if revision is None:
        return base
    if base is None or Path(base).exists() or "@" in base:
        raise click.UsageError("--revision is of a BASE that is a hub id without its own @revision")
    return f"{base}@{revision}"


def check_push(ctx: click.Context) -> None:
    """Check the repository before the command runs. Raises UsageError or OutputError."""
    said = ctx.meta.get(META, {})
    if said.get("push_to") is None:
        if said.get("public"):
            raise click.UsageError("--public belongs to --push-to", ctx)
        return
    if ctx.params.get("output") is None or ctx.params.get("part") is not None:
        raise click.UsageError("--push-to uploads a whole new output: not with --shards or --add", ctx)
    from adapter_merge.files.hub_upload import check_upload

    check_upload(said["push_to"], replace=bool(ctx.params.get("overwrite")))


def push(ctx: click.Context) -> None:
    """Upload what the command has written; in a dry run say what would go."""
    said: Mapping[str, Any] = ctx.meta.get(META, {})
    repository = said.get("push_to")
    if repository is None:
        return
    quiet = bool(ctx.params.get("quiet"))
    visibility = "public" if said.get("public") else "private"
    output = Path(ctx.params["output"])
    if ctx.params.get("dry_run"):
        for name in ctx.meta.get(PLANNED, ()):
            say(f"would upload {name}")
        say(f"would upload {output} to a new {visibility} repository {repository}, README.md and manifest included")
        return
    from adapter_merge.files.hub_upload import upload_folder

    say(f"uploading {output} to {repository}", quiet=quiet)
    message = f"adapter-merge {ctx.info_name}"
    url = upload_folder(output, repository, private=not said.get("public"), message=message)
    say(f"{repository}: {url}", quiet=quiet)


PLANNED = "adapter_merge.planned_files"


def plan_files(names: list[str]) -> None:
    """Keep the names of the files that a dry run would write."""
    click.get_current_context().meta[PLANNED] = names
