"""Options of the hub and of object storage: --revision and --token for inputs, --push-to and --public for outputs."""

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
        os.environ["HF_TOKEN"] = value  # huggingface_hub reads it


def hub_options(function: F) -> F:
    """Add the options --revision and --token."""
    for decorate in (
        option(
            "--token",
            metavar="TOKEN",
            section=HUB,
            expose_value=False,
            callback=_token,
            help="Token for private repositories; safer: HF_TOKEN or `hf auth login`, which process lists do not show.",
        ),
        option(
            "--revision",
            metavar="REVISION",
            section=HUB,
            expose_value=False,
            callback=_keep,
            help="Branch, tag or commit of BASE, a hub id; for other inputs write org/name@REVISION.",
        ),
    ):
        function = decorate(function)
    return function


def push_options(function: F) -> F:
    """Add the options --push-to and --public, and those of `hub_options`. Command.invoke runs the upload."""
    for decorate in (
        option(
            "--public",
            is_flag=True,
            section=HUB,
            expose_value=False,
            callback=_keep,
            help="--push-to: make a new repository public instead of private.",
        ),
        option(
            "--push-to",
            metavar="ORG/NAME|URL",
            section=HUB,
            expose_value=False,
            callback=_keep_push,
            help="Also upload the output, with its model card, to a new private repository, or to s3://bucket/folder.",
        ),
    ):
        function = decorate(function)
    return hub_options(function)


def add_revision(base: str | None) -> str | None:
    """Return BASE as org/name@REVISION where --revision is given. Raises UsageError where BASE is a folder."""
    revision = click.get_current_context().meta.get(META, {}).get("revision")
    if revision is None:
        return base
    if base is None or Path(base).exists() or "@" in base:
        raise click.UsageError("--revision needs a BASE that is a hub id without @revision")
    return f"{base}@{revision}"


def check_push(ctx: click.Context) -> None:
    """Check the repository or address before the command runs. Raises UsageError, InputError or OutputError."""
    given = ctx.meta.get(META, {})
    if given.get("push_to") is None:
        if given.get("public"):
            raise click.UsageError("--public needs --push-to", ctx)
        return
    if ctx.params.get("output") is None or ctx.params.get("part") is not None:
        raise click.UsageError("--push-to uploads a complete new output: it excludes --shards and --add", ctx)
    from adapter_merge.files.object_storage import check_address, is_url

    replace = bool(ctx.params.get("overwrite"))
    if not is_url(given["push_to"]):
        from adapter_merge.files.hub_upload import check_upload

        check_upload(given["push_to"], replace=replace)
    elif given.get("public"):
        raise click.UsageError("--public is for a repository of the hub: --push-to org/name", ctx)
    else:
        check_address(given["push_to"], replace)


def push(ctx: click.Context) -> None:
    """Upload the command's output; in a dry run, print what would be uploaded."""
    given: Mapping[str, Any] = ctx.meta.get(META, {})
    repository = given.get("push_to")
    if repository is None:
        return
    from adapter_merge.files.object_storage import is_url, upload

    quiet = bool(ctx.params.get("quiet"))
    visibility = "public" if given.get("public") else "private"
    output = Path(ctx.params["output"])
    if ctx.params.get("dry_run"):
        for name in ctx.meta.get(PLANNED, ()):
            say(f"would upload {name}")
        place = repository if is_url(repository) else f"a new {visibility} repository {repository}"
        say(f"would upload {output} to {place}, README.md and manifest included")
        return
    from adapter_merge.files.hub_upload import upload_folder

    say(f"uploading {output} to {repository}", quiet=quiet)
    if is_url(repository):
        say(f"{upload(output, repository)}: complete", quiet=quiet)
        return
    message = f"adapter-merge {ctx.info_name}"
    url = upload_folder(output, repository, private=not given.get("public"), message=message)
    say(f"{repository}: {url}", quiet=quiet)


PLANNED = "adapter_merge.planned_files"


def plan_files(names: list[str]) -> None:
    """Record the names of the files that a dry run would write, for `push`."""
    click.get_current_context().meta[PLANNED] = names
