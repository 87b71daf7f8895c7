"""adapter-merge generate: run an ONNX export."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from adapter_merge.cli.options.command import ENGINE, command, option
from adapter_merge.cli.options.shared import report_options
from adapter_merge.cli.options.values import DEVICE, stated_prompts
from adapter_merge.cli.printing.console import emit, say
from adapter_merge.cli.printing.progress import working


@command(examples=["./out --prompt 'What is gravity?'", "./out --adapter de --adapter fr --prompt @questions.txt"])
@click.argument("folder", metavar="ONNX_DIR", type=click.Path(path_type=Path))
@option("--prompt", required=True, metavar="TEXT|@FILE", help="The prompt; @FILE reads a file, - standard input.")
@option("--system", help="A system message.")
@option(
    "--adapter",
    "adapters",
    multiple=True,
    help="An adapter's name; 'base' is the model without an adapter. Repeat it to compare.",
)
@option(
    "--device",
    type=DEVICE,
    metavar="DEVICE",
    default="cpu",
    show_default=True,
    section=ENGINE,
    help="cpu, cuda or cuda:N.",
)
@option("--max-tokens", old=("--tokens",), default=128, show_default=True, type=click.IntRange(min=1))
@option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@option("--top-p", default=1.0, show_default=True, type=click.FloatRange(min=0, max=1, min_open=True))
@option("--seed", type=int)
@option("--raw", is_flag=True, help="Do not use the chat template.")
@option("--engine", type=click.Choice(["auto", "genai", "onnxruntime"]), default="auto", show_default=True)
@option("--threads", type=click.IntRange(min=1), help="Number of onnxruntime's threads on the CPU.")
@report_options
def generate(
    folder: Path,
    prompt: str,
    system: str | None,
    adapters: tuple[str, ...],
    device: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    raw: bool,
    engine: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer PROMPT with the export in ONNX_DIR, streamed; with several --adapter, one answer for each."""
    from dataclasses import asdict

    from adapter_merge.export import generation
    from adapter_merge.export.engine.prompting import Sampling

    prompt = "\n".join(stated_prompts((prompt,)) or [""])
    compares = len(adapters) > 1
    at_once = compares and is_batched(folder)  # the streams of one batch would interleave
    last: list[str] = []

    until_text = ExitStack()

    def show(adapter: str, text: str) -> None:
        if as_json or at_once or not text:
            return
        until_text.close()
        if compares and last[-1:] != [adapter]:
            click.echo(("\n" if last else "") + f"[{adapter}] ", nl=False)
            last.append(adapter)
        click.echo(text, nl=False)

    with until_text:
        until_text.enter_context(working(f"running {folder}", quiet))
        answers = generation.generate(
            folder,
            prompt,
            adapters,
            device=device,
            system=system,
            raw=raw,
            sampling=Sampling(max_tokens, temperature, top_p, seed),
            engine=engine,
            threads=threads,
            show=show,
        )
    if as_json:
        emit({"answers": [{**asdict(answer), "tokens_per_second": answer.tokens_per_second} for answer in answers]})
        return
    if at_once:
        for answer in answers:
            click.echo(f"[{answer.adapter}] {answer.text}")
    else:
        click.echo()
    for answer in answers:
        say(
            f"{answer.adapter}: {answer.tokens} tokens, prefill {answer.prefill_seconds * 1e3:.0f} ms, "
            f"decode {answer.tokens_per_second:.1f} tokens/s ({answer.engine})",
            quiet=quiet,
        )


def is_batched(folder: Path) -> bool:
    """Return True for an export that computes all answers in one batch."""
    from adapter_merge.export.folder.contents import read_export

    return read_export(folder).mode == "batched"
