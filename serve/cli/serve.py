"""adapter-merge serve: an OpenAI-compatible server of a base and many adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapter_merge.cli.options.command import Command, command, option
from adapter_merge.cli.options.inputs import named_inputs
from adapter_merge.cli.options.shared import dry_run_option, report_options
from adapter_merge.cli.options.stated_settings import adapter_options, read_single_stated, read_stated, stated_arguments
from adapter_merge.cli.options.values import SIZE, SOURCE
from adapter_merge.outputs.unlisted_files import holds_graph
from adapter_merge.serve.conversion.cache import DEFAULT_BYTES

if TYPE_CHECKING:
    from adapter_merge.serve.conversion.stated_settings import Stated


CONVERSION_BYTES, CONVERSION_SECONDS = 8 * 10**9, 900


class WithRest(Command):
    """A command that keeps the arguments after `--` for vLLM."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own_arguments, vllm_flags = args, []
        if "--" in args:
            cut = args.index("--")
            own_arguments, vllm_flags = args[:cut], args[cut + 1 :]
        ctx.meta["vllm_flags"] = vllm_flags
        return super().parse_args(ctx, list(own_arguments))

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- VLLM FLAGS]"]


@command(
    cls=WithRest,
    examples=[
        "Qwen/Qwen2.5-0.5B support=./dude sql=./dcft",
        "./base --adapter-dir ./adapters --port 9000 -- --dtype bfloat16",
    ],
)
@click.argument("base", type=SOURCE)
@click.argument("adapters", type=SOURCE, nargs=-1, metavar="[[NAME=]ADAPTER]...")
@option(
    "--adapter-dir",
    help="Serve the adapters in this folder by their folders' names; each is converted at its first request. "
    "s3://bucket/folder and hf://org/name are copied, and updated every 30 s.",
)
@option("--preload", is_flag=True, help="Convert all adapters of --adapter-dir before the server starts.")
@option(
    "--allow-loading",
    is_flag=True,
    help="Let clients load and unload adapters: /v1/load_lora_adapter, /v1/unload_lora_adapter, /adapters.",
)
@option(
    "--adapter-root",
    "roots",
    multiple=True,
    metavar="DIR",
    help="With --allow-loading: a folder that clients may load from, besides --adapter-dir. Repeatable.",
)
@option("--page", is_flag=True, help="Add a page at /page to try the base and the adapters side by side.")
@option("--host", help="Address to listen on; 0.0.0.0 opens the server to the network.  [default: 127.0.0.1]")
@option("--port", type=click.IntRange(0, 65535), help="[default: 8000]")
@option(
    "--api-key",
    help="A key that every request must send; VLLM_API_KEY keeps it out of the list of processes.",
)
@option(
    "--shutdown-timeout",
    type=click.IntRange(min=0),
    metavar="SECONDS",
    help="Time for running requests to finish after SIGTERM.  [default: 30]",
)
@option(
    "--max-active",
    type=click.IntRange(min=1),
    help="Number of adapters in one batch (default: all named adapters, at most 16).",
)
@option(
    "--cache-size",
    type=SIZE,
    default=DEFAULT_BYTES,
    show_default="50GB",
    metavar="SIZE",
    help="Maximal size of the cache of adapters.",
)
@option(
    "--conversion-memory",
    type=SIZE,
    default=CONVERSION_BYTES,
    show_default="8GB",
    metavar="SIZE",
    help="Memory limit of a conversion while the server runs; the adapter is refused above it.",
)
@option(
    "--conversion-seconds",
    type=click.IntRange(min=1),
    default=CONVERSION_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Time limit of a conversion while the server runs; the adapter is refused after it.",
)
@adapter_options
@dry_run_option
@option(
    "--emit",
    type=click.Choice(["k8s", "ray"]),
    help="Print this service as a Kubernetes manifest or a Ray Serve configuration, and exit.",
)
@option("--name", default="adapter-merge", show_default=True, help="Name of the service, with --emit.")
@option("--image", default="adapter-merge-vllm", show_default=True, help="Container image, with --emit k8s.")
@report_options
@click.pass_context
def serve(
    ctx: click.Context,
    base: str,
    adapters: tuple[str, ...],
    adapter_dir: str | None,
    preload: bool,
    allow_loading: bool,
    roots: tuple[str, ...],
    page: bool,
    host: str | None,
    port: int | None,
    api_key: str | None,
    shutdown_timeout: int | None,
    max_active: int | None,
    cache_size: int,
    conversion_memory: int,
    conversion_seconds: int,
    dry_run: bool,
    emit: str | None,
    name: str,
    image: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Serve BASE with many adapters at once: vLLM's OpenAI server.

    BASE may be a folder that `export` wrote: onnxruntime serves it and its adapters, without vLLM.

    BASE and ADAPTER are folders or hub ids. An adapter may be a DCFT, DuDe, LoRA, rsLoRA, PiSSA or DoRA
    adapter of any format that `inspect` knows; it is converted once and kept in a cache. A request selects its
    adapter by the model's name. An adapter without NAME gets its folder's name. Flags after -- are passed to vLLM.
    """
    if holds_graph(Path(base)):
        _serve_export(ctx, Path(base), quiet)
        return
    from adapter_merge.serve.conversion.cache import Cache
    from adapter_merge.serve.conversion.mirror import Mirror, is_remote
    from adapter_merge.serve.conversion.processes import Limits
    from adapter_merge.serve.launch.emit import Service, make_kubernetes_manifest, make_ray_config
    from adapter_merge.serve.launch.flags import check_with_vllm, shell_line
    from adapter_merge.serve.launch.plan import make_plan
    from adapter_merge.serve.launch.process import run

    if emit is None:
        adapters = _with_names(adapters)
    direct = {"--host": host, "--port": port, "--api-key": api_key, "--shutdown-timeout": shutdown_timeout}
    vllm_flags = _join_flags(direct, ctx.meta["vllm_flags"])
    if emit is not None:
        if allow_loading or roots or preload or page:
            raise click.UsageError(
                "--emit cannot be combined with --allow-loading, --adapter-root, --preload or --page"
            )
        stated = stated_arguments()
        service = Service(
            name=name,
            base=base,
            adapters=adapters,
            adapter_dir=adapter_dir,
            max_active=max_active,
            cache_size=None if cache_size == DEFAULT_BYTES else f"{cache_size}B",
            stated=tuple(stated),
            vllm_flags=tuple(vllm_flags),
            image=image,
        )
        if emit == "k8s":
            click.echo(make_kubernetes_manifest(service), nl=False)
        else:
            click.echo(make_ray_config(replace(service, ranks=_ranks(base, adapters))), nl=False)
        return

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    mirror = Mirror(adapter_dir) if adapter_dir is not None and is_remote(adapter_dir) else None
    if mirror is not None:
        say(f"copying {adapter_dir} to {mirror.folder}")
        mirror.update()
    folder = mirror.folder if mirror is not None else Path(adapter_dir) if adapter_dir is not None else None
    plan = make_plan(
        base,
        adapters,
        adapter_dir=folder,
        max_active=max_active,
        loading=allow_loading,
        roots=[Path(root) for root in roots],
        page=page,
        preload=preload,
        limits=Limits(conversion_memory, conversion_seconds),
        cache=Cache(max_bytes=cache_size),
        vllm_flags=vllm_flags,
        stated=_stated(adapters),
    )
    if dry_run:
        if ctx.meta["vllm_flags"]:
            check_with_vllm(plan.command())
        about = plan.describe()
        click.echo(json.dumps(about, indent=2) if as_json else _format_plan(about, shell_line))
        return
    if mirror is not None:
        mirror.start(say)
    status = run(plan, say)
    if mirror is not None:
        mirror.stop()
    ctx.exit(status)


OF_EXPORTS = ("base", "host", "port", "api_key", "shutdown_timeout", "quiet")


def _serve_export(ctx: click.Context, folder: Path, quiet: bool) -> None:
    """Serve an ONNX export. Raises UsageError for options that only vLLM has."""
    from importlib import import_module

    stated_names = [name for name in ctx.params if ctx.get_parameter_source(name) != click.core.ParameterSource.DEFAULT]
    wrong = [name.replace("_", "-") for name in stated_names if name not in OF_EXPORTS]
    if wrong or ctx.meta["vllm_flags"]:
        raise click.UsageError(
            f"{folder} is an ONNX export, which is served without vLLM: leave out {', '.join(wrong) or '--'}"
        )
    options = {name: ctx.params[name] for name in OF_EXPORTS[1:-1] if ctx.params[name] is not None}
    served = import_module("adapter_merge.export.serving.command")
    served.serve_export(folder, **options, say=lambda line: None if quiet else click.echo(line, err=True))


def _with_names(adapters: tuple[str, ...]) -> tuple[str, ...]:
    """Return NAME=ADAPTER for each adapter; an adapter without a name gets its folder's name."""
    named = named_inputs(adapters)
    return tuple(text if "=" in text else made for text, made in zip(adapters, named, strict=True))


def _join_flags(direct: dict[str, Any], vllm_flags: list[str]) -> list[str]:
    """Return shared options as vLLM's flags, followed by those after `--`. Raises UsageError for one in both."""
    from adapter_merge.serve.launch.flags import has_option

    stated = {flag: str(value) for flag, value in direct.items() if value is not None}
    for flag in stated:
        if has_option(vllm_flags, flag):
            raise click.UsageError(f"{flag} is given before and after --")
    return [f"{flag}={value}" for flag, value in stated.items()] + vllm_flags


def _stated(adapters: tuple[str, ...]) -> dict[str, Stated]:
    """Return the stated settings of each named adapter."""
    from adapter_merge.serve.conversion.stated_settings import FILE, Stated

    names = [text.partition("=")[0] for text in adapters if "=" in text]
    if names:
        return {name: Stated.of(*settings) for name, settings in read_stated(names).items()}
    if Stated.of(*read_single_stated()).values:
        raise click.UsageError(f"these options are for NAME=ADAPTER; the adapters of a folder state them in {FILE}")
    return {}


def _ranks(base: str, adapters: tuple[str, ...]) -> dict[str, int]:
    """Return the rank of each NAME=ADAPTER, from headers."""
    from adapter_merge.serve.conversion.served_folder import Converter

    stated = _stated(adapters)
    pairs = [(name, folder) for name, _, folder in (text.partition("=") for text in adapters)]
    converter = Converter(base) if pairs else None
    return {name: converter.outline(folder, stated.get(name)).rank for name, folder in pairs if converter is not None}


def _format_plan(about: dict[str, Any], shell_line: Any) -> str:
    """Return the plan of --dry-run as text."""
    lines = [shell_line(about["command"], about["environment"]), ""]
    for name, adapter in about["adapters"].items():
        state = "is in the cache" if adapter["cached"] else "would be converted"
        lines += [f"{name}: {adapter['method']}, rank {adapter['rank']}, {state}", f"  {adapter['folder']}"]
    lines += [f"{name}: {method}, loaded on request" for name, method in about["adapter_dir"].items()]
    lines += about["notes"]
    return "\n".join(lines)
