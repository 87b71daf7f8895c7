"""adapter-merge cache: list, fill, verify and clear the cache of converted adapters."""

from __future__ import annotations

import json

import click

from adapter_merge.cli.options.command import Command, option
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.stated_settings import adapter_options, read_single_stated
from adapter_merge.cli.options.values import SIZE, SOURCE
from adapter_merge.serve.conversion.cache import DEFAULT_BYTES


@click.group()
def cache() -> None:
    """Manage the cache of converted adapters that `serve` uses."""


@cache.command("list", cls=Command)
@report_options
def list_entries(as_json: bool, quiet: bool) -> None:
    """Show every converted adapter, the least recently used first."""
    from datetime import datetime

    from adapter_merge.serve.conversion.cache import Cache

    cache = Cache()
    entries = cache.entries()
    total = sum(entry.nbytes for entry in entries)
    if as_json:
        rows = [
            {
                "key": entry.key,
                "adapter": entry.adapter,
                "base": entry.base,
                "bytes": entry.nbytes,
                "used": entry.used,
                "in_use": entry.in_use,
            }
            for entry in entries
        ]
        click.echo(json.dumps({"root": str(cache.root), "bytes": total, "entries": rows}, indent=2))
        return
    for entry in entries:
        when = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        used = "in use" if entry.in_use else when
        size = f"{entry.nbytes / 1e6:9.1f} MB"
        click.echo(f"{entry.key[:12]}  {size}  {used:>16}  {entry.adapter} on {entry.base}")
    click.echo(f"{len(entries)} adapters, {total / 1e6:.1f} MB in {cache.root}", err=True)


@cache.command("add", cls=Command)
@click.argument("base", type=SOURCE)
@click.argument("adapters", type=SOURCE, nargs=-1, required=True, metavar="ADAPTER...")
@option(
    "--cache-size",
    type=SIZE,
    default=DEFAULT_BYTES,
    show_default="50GB",
    metavar="SIZE",
    help="Maximal size of the cache of adapters.",
)
@adapter_options
@report_options
def add_entries(base: str, adapters: tuple[str, ...], cache_size: int, as_json: bool, quiet: bool) -> None:
    """Convert adapters for BASE into the cache, before a server needs them.

    The options apply to every ADAPTER.
    """
    from adapter_merge.errors import AdapterMergeError, Problem, raise_all
    from adapter_merge.serve.conversion.cache import Cache
    from adapter_merge.serve.conversion.served_folder import Converter, allowed_rank
    from adapter_merge.serve.conversion.stated_settings import Stated
    from adapter_merge.serve.launch.process import describe_adapter

    stated = Stated.of(*read_single_stated())
    converter = Converter(base, Cache(max_bytes=cache_size))
    problems: list[Problem] = []
    rows = []
    for adapter in adapters:
        try:
            outline = converter.outline(adapter, stated)
            allowed_rank(outline.rank)
            served = converter.obtain(adapter, stated)
        except AdapterMergeError as error:
            problems += error.problems
            continue
        served.release()
        key, cached = served.folder.name, served.seconds is None
        rows.append({"key": key, "adapter": adapter, "rank": served.rank, "cached": cached, "origin": served.origin})
        if not as_json:
            click.echo(f"{key[:12]}  {describe_adapter(adapter, outline.method, served)}")
    if as_json:
        click.echo(json.dumps({"root": str(converter.cache.root), "entries": rows}, indent=2))
    raise_all(problems)


@cache.command("verify", cls=Command)
@report_options
@click.pass_context
def verify_entries(ctx: click.Context, as_json: bool, quiet: bool) -> None:
    """Read every converted adapter and compare it with its hashes; exit code 1 when one is damaged."""
    from adapter_merge.serve.conversion.cache import Cache

    cache = Cache()
    damaged = cache.verify()
    count = len(cache.entries())
    if as_json:
        rows = [{"key": entry.key, "adapter": entry.adapter, "problems": problems} for entry, problems in damaged]
        click.echo(json.dumps({"root": str(cache.root), "entries": count, "damaged": rows}, indent=2))
    else:
        for entry, problems in damaged:
            click.echo(f"{entry.key[:12]}  {entry.adapter}: {'; '.join(problems)}")
        click.echo(f"{count} adapters, {len(damaged)} damaged (converted again at their next use)", err=True)
    ctx.exit(1 if damaged else 0)


@cache.command("clear", cls=Command)
@report_options
def clear_entries(as_json: bool, quiet: bool) -> None:
    """Remove every converted adapter that no server is using."""
    from adapter_merge.serve.conversion.cache import Cache

    cache = Cache()
    removed, in_use = cache.clear()
    freed = sum(entry.nbytes for entry in removed)
    if as_json:
        click.echo(json.dumps({"removed": len(removed), "bytes": freed, "in_use": len(in_use)}))
        return
    remaining = f"; {len(in_use)} are in use and stay" if in_use else ""
    click.echo(f"removed {len(removed)} adapters, {freed / 1e6:.1f} MB{remaining}", err=True)
