"""Combinations on the command line: options of merge and factor, and the command extract."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .cli import device_option, dry_run_option, emit, output_option, progress_bar, report_options

if TYPE_CHECKING:
    from .recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
META = "adapter_merge.combination"
NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<value>.+)")
METHODS = ("linear", "ties", "dare", "dare-ties", "magnitude-prune", "breadcrumbs")  # combination.py needs torch


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(META, {})[parameter.name] = value


def combination_options(function: F) -> F:
    """How several adapters go together. The values are kept for `stated_recipe`."""
    for option in (
        click.option(
            "--recipe",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The combination as YAML, JSON or TOML, in place of NAME=ADAPTER and these options.",
        ),
        click.option("--seed", type=int, help="dare: of the random numbers; 0 when not given."),
        click.option("--gamma", type=float, help="breadcrumbs: share of the largest elements dropped."),
        click.option("--density", type=float, help="Share of each delta's elements kept; 1 when not given."),
        click.option("--combine", type=click.Choice(METHODS), help="How; linear when not given."),
        click.option("--weight", multiple=True, metavar="NAME=NUMBER", help="An adapter's weight; 1 when not given."),
    ):
        function = _hidden(option, function)
    return function


def _hidden(option: Callable[[F], F], function: F) -> F:
    """Apply `option` so that its value goes to the context, not to the function."""
    function = option(function)
    parameter = function.__click_params__[-1]  # type: ignore[attr-defined]
    parameter.expose_value = False
    parameter.callback = _keep
    return function


def _named(text: str) -> tuple[str, str] | None:
    match = NAMED.fullmatch(text)
    return (match["name"], match["value"]) if match and not Path(text).exists() else None


def stated_recipe(inputs: tuple[str, ...]) -> tuple[str | None, Recipe] | None:
    """(base, recipe) where the command line asks for a combination, else None. Raises UsageError for half of one."""
    from .combination import Settings
    from .errors import InputError
    from .recipe import Ingredient, make_recipe, read_recipe

    said = click.get_current_context().meta.get(META, {})
    file, weights = said.get("recipe"), said.get("weight") or ()
    given = {key: said[key] for key in ("combine", "density", "gamma", "seed") if said.get(key) is not None}
    named = [pair for text in inputs[1:] if (pair := _named(text)) is not None]
    if file is not None:
        if named or weights or given or len(inputs) > 1:
            raise click.UsageError("--recipe says it all: leave out adapters, weights and the other options")
        return (inputs[0] if inputs else None), read_recipe(file)
    if not named:
        if weights or given:
            raise click.UsageError("a combination needs BASE NAME=ADAPTER ...")
        return None
    if len(named) != len(inputs) - 1:
        raise click.UsageError("give every adapter a name: BASE NAME=ADAPTER NAME=ADAPTER ...")
    factors: dict[str, float] = {}
    for text in weights:
        name, _, number = text.partition("=")
        try:
            factors[name] = float(number)
        except ValueError as error:
            raise click.UsageError(f"--weight {text}: expected NAME=NUMBER") from error
    unknown = sorted(factors.keys() - {name for name, _ in named})
    if unknown:
        raise InputError(f"--weight names no adapter: {', '.join(unknown)}", expected=", ".join(n for n, _ in named))
    ingredients = [Ingredient(name, path, factors.get(name, 1.0)) for name, path in named]
    settings = Settings(
        given.get("combine", "linear"), given.get("density", 1.0), given.get("gamma", 0.0), given.get("seed", 0)
    )
    return inputs[0], make_recipe(ingredients, settings)


@click.command()
@click.argument("base")
@click.argument("finetuned")
@output_option
@click.option("--rank", default="16", show_default=True, help="A rank (16), or each weight's energy to keep (0.99).")
@click.option("--row-scale", is_flag=True, help="A DoRA: row scales as well, which fit changed magnitudes far better.")
@device_option
@dry_run_option
@report_options
def extract(
    base: str,
    finetuned: str,
    output: str,
    overwrite: bool,
    rank: str,
    row_scale: bool,
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the LoRA that turns BASE into FINETUNED, as well as its rank allows, with its error per weight."""
    from .checkpoint import open_checkpoint
    from .extraction import extract as run
    from .extraction import worst_error
    from .factors import parse_rank

    started = time.perf_counter()
    total = open_checkpoint(finetuned).nbytes
    with progress_bar("extracting", total, quiet or as_json) as progress:
        content = run(
            base,
            finetuned,
            output,
            rank=parse_rank(rank),
            row_scale=row_scale,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        emit(content)
    elif dry_run:
        click.echo(f"would write {output}: an adapter of rank {rank} from {finetuned}")
    else:
        ranks = sorted({layer["rank"] for layer in content["layers"].values()})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} .. {ranks[-1]}"
        seconds = time.perf_counter() - started
        click.echo(f"{output}: {content['form']} of {len(content['layers'])} weights, rank {span}, in {seconds:.1f} s")
        click.echo(f"  relative error of dW at most {worst_error(content):.2g}")
        if content["carried_over"]:
            click.echo(f"  carried over whole: {', '.join(content['carried_over'][:8])}")
