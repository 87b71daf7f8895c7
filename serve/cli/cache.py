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
    """The cache of converted adapters that `serve` keeps."""


@cache.command("list", cls=Command)
@report_options
def list_entries(as_json: bool, quiet: bool) -> None:
    """Show every converted adapter, the least recently used first."""
    from datetime import datetime

    from adapter_merge.serve.conversion.cache import Cache

    found = Cache()
    entries = found.entries()
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
        click.echo(json.dumps({"root": str(found.root), "bytes": total, "entries": rows}, indent=2))
        return
    for entry in entries:
        when = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        used = "in use" if entry.in_use else when
        size = f"{entry.nbytes / 1e6:9.1f} MB"
        click.echo(f"{entry.key[:12]}  {size}  {used:>16}  {entry.adapter} on {entry.base}")
    click.echo(f"{len(entries)} adapters, {total / 1e6:.1f} MB in {found.root}", err=True)


@cache.command("add", cls=Command)
@click.argument("base", type=SOURCE)
@click.argument("adapters", type=SOURCE, nargs=-1, required=True, metavar="ADAPTER...")
@option(
    "--cache-size",
    type=SIZE,
    default=DEFAULT_BYTES,
    show_default="50GB",
    metavar="SIZE",
    help="Bound of the cache of adapters.",
)
@adapter_options
@report_options
def add_entries(base: str, adapters: tuple[str, ...], cache_size: int, as_json: bool, quiet: bool) -> None:
    """Convert adapters for BASE now, so that a server finds them in the cache.

    The options say the same of every ADAPTER.
    """
    from adapter_merge.errors import AdapterMergeError, Problem, raise_all
    from adapter_merge.serve.conversion.cache import Cache
    from adapter_merge.serve.conversion.served import Converter, allowed_rank
    from adapter_merge.serve.conversion.stated_settings import Stated
    from adapter_merge.serve.launch.process import described

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
            click.echo(f"{key[:12]}  {described(adapter, outline.method, served)}")
    if as_json:
        click.echo(json.dumps({"root": str(converter.cache.root), "entries": rows}, indent=2))
    raise_all(problems)


@cache.command("verify", cls=Command)
@report_options
@click.pass_context
def verify_entries(ctx: click.Context, as_json: bool, quiet: bool) -> None:
    """Read every converted adapter and compare it with its hashes; exit code 1 when one is damaged."""
    from adapter_merge.serve.conversion.cache import Cache

    found = Cache()
    damaged = found.verify()
    count = len(found.entries())
    if as_json:
        rows = [{"key": entry.key, "adapter": entry.adapter, "problems": problems} for entry, problems in damaged]
        click.echo(json.dumps({"root": str(found.root), "entries": count, "damaged": rows}, indent=2))
    else:
        for entry, problems in damaged:
            click.echo(f"{entry.key[:12]}  {entry.adapter}: {'; '.join(problems)}")
        click.echo(f"{count} adapters, {len(damaged)} damaged (made again when they are next used)", err=True)
    ctx.exit(1 if damaged else 0)


@cache.command("clear", cls=Command)
@report_options
def clear_entries(as_json: bool, quiet: bool) -> None:
    """Remove every converted adapter that no server is using."""
    from adapter_merge.serve.conversion.cache import Cache

    found = Cache()
    removed, kept = found.clear()
    freed = sum(entry.nbytes for entry in removed)
    if as_json:
        click.echo(json.dumps({"removed": len(removed), "bytes": freed, "in_use": len(kept)}))
        return
    in_use = f"; {len(kept)} are in use and stay" if kept else ""
    click.echo(f"removed {len(removed)} adapters, {freed / 1e6:.1f} MB{in_use}", err=True)
