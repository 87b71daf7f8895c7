"""Streamed text generation from an export: by onnxruntime-genai where its configuration exists, else by onnxruntime.

onnxruntime-genai does not support adapter_ids, so a batched export always runs in onnxruntime, with the answers of all
adapters in one batch. An adapter is selected before the first token of an answer, because the KV cache holds values of
one adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError
from adapter_merge.export.engine.decoder_session import Decoder
from adapter_merge.export.engine.genai import open_genai
from adapter_merge.export.engine.prompting import Prompter, Sampling, limit_to_context, make_chooser
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.contents import folder_layout, read_export
from adapter_merge.export.graph.adapter_file import SUFFIX, check_adapter

BASE = "base"  # the name of the model without an adapter in --adapter


@dataclass(frozen=True)
class Answer:
    """One finished answer."""

    adapter: str
    text: str
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    switch_seconds: float
    engine: str

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, without the first one (prefill)."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds else 0.0


def generate(
    folder: Path,
    prompt: str,
    adapters: Sequence[str] = (),
    *,
    device: str = "cpu",
    system: str | None = None,
    raw: bool = False,
    sampling: Sampling | None = None,
    engine: str = "auto",
    threads: int | None = None,
    show: Callable[[str, str], None] = lambda adapter, text: None,
) -> list[Answer]:
    """Return one answer per name in `adapters` ("base": none); `show` gets (adapter, text) as the text appears.

    engine: auto, genai or onnxruntime. Raises InputError for an unknown adapter before the model is loaded, and
    MissingDependencyError when the device's provider does not load.
    """
    sampling = sampling or Sampling()
    check_packages("onnx_ir")
    manifest = read_export(folder)
    if manifest.kind != "decoder":
        raise InputError(f"{folder}: a classifier, which generates no text", hint="run it with onnxruntime")
    layout = folder_layout(folder)
    names = list(adapters) or [BASE]
    adapter_names = set(layout.adapters) if layout.mode == "batched" else _list_adapter_files(folder)
    if layout.mode == "merged":
        adapter_names = set()
    wrong = [name for name in names if name != BASE and name not in adapter_names]
    if wrong:
        raise InputError(
            f"{folder}: no adapter named {', '.join(wrong)}", expected=", ".join([BASE, *sorted(adapter_names)])
        )
    prompter = Prompter(folder)
    ids = prompter.encode(prompt, system, raw)
    sampling = limit_to_context(folder, len(ids), sampling)
    engine = choose_engine(folder, layout.mode, engine)
    if engine == "genai":
        runner: Iterator[Answer] = _with_genai(folder, ids, names, prompter, device, sampling, show)
    elif layout.mode == "batched" and len(names) > 1:
        runner = _in_one_batch(folder, ids, names, prompter, device, sampling, threads, show)
    else:
        runner = _with_onnxruntime(folder, ids, names, prompter, device, sampling, threads, show)
    return list(runner)


def choose_engine(folder: Path, mode: str, engine: str) -> str:
    """Return "genai" or "onnxruntime". Raises InputError when `wanted` cannot run this export."""
    possible = mode != "batched" and (folder / "genai_config.json").is_file()
    installed = find_spec("onnxruntime_genai") is not None
    if engine == "auto":
        return "genai" if possible and installed else "onnxruntime"
    if engine == "genai":
        check_packages("onnxruntime_genai")
        if not possible:
            raise InputError(
                f"{folder}: onnxruntime-genai cannot run this export",
                expected="a merged or switchable export with genai_config.json",
                hint="--engine onnxruntime",
            )
    return engine


def _list_adapter_files(folder: Path) -> set[str]:
    return {path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")}


def _with_genai(
    folder: Path,
    ids: list[int],
    names: list[str],
    prompter: Prompter,
    device: str,
    sampling: Sampling,
    show: Callable[[str, str], None],
) -> Iterator[Answer]:
    import onnxruntime_genai as og

    layout = folder_layout(folder)
    for name in names:
        if name != BASE:
            check_adapter(folder / f"{name}{SUFFIX}", layout)
    model = open_genai(folder, device)
    genai_adapters = og.Adapters(model)
    loaded_names: set[str] = set()
    for name in names:
        switching = time.perf_counter()
        parameters = og.GeneratorParams(model)
        options: dict[str, Any] = {"max_length": len(ids) + sampling.max_tokens, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed
        parameters.set_search_options(**options)
        generator = og.Generator(model, parameters)
        if name != BASE:
            if name not in loaded_names:
                genai_adapters.load(str((folder / f"{name}{SUFFIX}").resolve()), name)
                loaded_names.add(name)
            generator.set_active_adapter(genai_adapters, name)
        started = time.perf_counter()
        generator.append_tokens(ids)
        push, text, count = prompter.stream(), "", 0
        first = started
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            count += 1
            if count == 1:
                first = time.perf_counter()
            if token in prompter.stops:
                break
            piece = push(token)
            text += piece
            show(name, piece)
        ended = time.perf_counter()
        yield Answer(name, text, count, first - started, ended - first, started - switching, "onnxruntime-genai")
        del generator


def _with_onnxruntime(
    folder: Path,
    ids: list[int],
    names: list[str],
    prompter: Prompter,
    device: str,
    sampling: Sampling,
    threads: int | None,
    show: Callable[[str, str], None],
) -> Iterator[Answer]:
    import numpy as np

    decoder = Decoder(folder, device, threads)
    for name in names:
        switching = time.perf_counter()
        choose = make_chooser(sampling)
        cache = decoder.start(len(ids) + sampling.max_tokens, None if name == BASE else name)
        started = time.perf_counter()
        logits = decoder.step(cache, np.asarray([ids]))
        first = time.perf_counter()
        push, text, count = prompter.stream(), "", 0
        while True:
            token = choose(logits[0, -1])
            count += 1
            if token in prompter.stops:
                break
            piece = push(token)
            text += piece
            show(name, piece)
            if count == sampling.max_tokens:
                break
            logits = decoder.step(cache, np.asarray([[token]]))
        ended = time.perf_counter()
        yield Answer(name, text, count, first - started, ended - first, started - switching, "onnxruntime")


def _in_one_batch(
    folder: Path,
    ids: list[int],
    names: list[str],
    prompter: Prompter,
    device: str,
    sampling: Sampling,
    threads: int | None,
    show: Callable[[str, str], None],
) -> Iterator[Answer]:
    """Generate with all adapters at once, one row each; a finished row stays in the batch until all have finished."""
    import numpy as np

    decoder = Decoder(folder, device, threads)
    rows = [None if name == BASE else name for name in names]
    cache = decoder.start(len(ids) + sampling.max_tokens, rows)
    choosers = [make_chooser(sampling) for _ in names]
    streams = [prompter.stream() for _ in names]
    texts, counts, running = [""] * len(names), [0] * len(names), [True] * len(names)
    started = time.perf_counter()
    logits = decoder.step(cache, np.tile(np.asarray([ids]), (len(names), 1)))
    first = time.perf_counter()
    for step in range(sampling.max_tokens):
        tokens = [choose(logits[row, -1]) for row, choose in enumerate(choosers)]
        for row, token in enumerate(tokens):
            if not running[row]:
                continue
            counts[row] += 1
            if token in prompter.stops:
                running[row] = False
                continue
            piece = streams[row](token)
            texts[row] += piece
            show(names[row], piece)
        if not any(running) or step + 1 == sampling.max_tokens:
            break
        logits = decoder.step(cache, np.asarray(tokens)[:, None])
    ended = time.perf_counter()
    for row, name in enumerate(names):
        yield Answer(name, texts[row], counts[row], first - started, ended - first, 0.0, "onnxruntime")
