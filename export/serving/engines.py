"""The engines behind the server. Each runs in one thread with a queue, so that a model never runs two jobs at once.

onnxruntime-genai answers one job after the other, each with its adapter. A batched export, which it cannot run, runs in
onnxruntime: all waiting jobs form one padded batch, every row with its own adapter, and later jobs wait until the batch
has ended. GPT-2 runs in onnxruntime, one job at a time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapter_merge.errors import AdapterMergeError
from adapter_merge.export.engine.genai import open_genai
from adapter_merge.export.engine.prompting import make_chooser
from adapter_merge.export.engine.running import Decoder
from adapter_merge.export.engine.runtime import check_packages
from adapter_merge.export.folder.contents import folder_layout
from adapter_merge.export.graph.adapter_file import SUFFIX, check_adapter

from .job import Job, Token

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BATCH = 16
LOG = logging.getLogger("adapter_merge.serving")


class Engine(Protocol):
    """An engine that answers up to `max_batch` jobs in one call."""

    max_batch: int

    def run(self, jobs: list[Job]) -> None:
        """Answer all `jobs`. An exception becomes the error of the jobs that have not ended."""


class Worker:
    """The thread of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="engine").start()

    def submit(self, job: Job) -> Job:
        """Queue `job`."""
        self._waiting.put(job)
        return job

    def _work(self) -> None:
        while True:
            jobs = [self._waiting.get()]
            while len(jobs) < self.engine.max_batch:
                try:
                    jobs.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            jobs = [job for job in jobs if not job.given_up]
            error: AdapterMergeError | None = None
            try:
                if jobs:
                    self.engine.run(jobs)
            except AdapterMergeError as caught:  # an error ends these jobs, not the thread
                error = caught
            except Exception as caught:
                LOG.exception("the engine failed")
                error = AdapterMergeError(f"the engine failed: {type(caught).__name__}")
            for job in jobs:
                job.end(error)


class GenaiEngine:
    """onnxruntime-genai, one job at a time."""

    max_batch = 1

    def __init__(self, folder: Path, device: str, stops: Collection[int]) -> None:
        check_packages("onnxruntime_genai")
        import onnxruntime_genai as og

        self.folder, self.stops, self.layout = folder, stops, folder_layout(folder)
        self.model = open_genai(folder, device)
        self.adapters = og.Adapters(self.model)
        self._loaded: set[str] = set()

    def run(self, jobs: list[Job]) -> None:
        """Answer the job; its adapter is set before the first token."""
        import onnxruntime_genai as og

        (job,) = jobs
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(job.ids) + job.sampling.max_tokens, do_sample=False)
        generator = og.Generator(self.model, parameters)
        if job.adapter is not None:
            if job.adapter not in self._loaded:
                file = self.folder / f"{job.adapter}{SUFFIX}"
                check_adapter(file, self.layout)
                self.adapters.load(str(file.resolve()), job.adapter)
                self._loaded.add(job.adapter)
            generator.set_active_adapter(self.adapters, job.adapter)
        generator.append_tokens(job.ids)
        if job.scored:
            job.prompt_logprobs = prompt_logprobs(generator.get_output("logits")[0], job.ids)
        answer = _Answer(job, self.stops)
        while answer.add(generator.get_logits().reshape(-1)):
            generator.append_tokens([answer.last])


class DecoderEngine:
    """onnxruntime: a batched export, or a decoder without genai_config.json."""

    def __init__(self, folder: Path, device: str, stops: Collection[int]) -> None:
        self.decoder, self.stops = Decoder(folder, device), stops
        self.max_batch = MAX_BATCH if self.decoder.layout.mode == "batched" else 1

    def run(self, jobs: list[Job]) -> None:
        """Answer the jobs in one batch, their prompts padded on the left."""
        import numpy as np

        width = max(len(job.ids) for job in jobs)
        ids, mask = np.zeros((len(jobs), width), np.int64), np.zeros((len(jobs), width), np.int64)
        for row, job in enumerate(jobs):
            ids[row, width - len(job.ids) :] = job.ids
            mask[row, width - len(job.ids) :] = 1
        rows = [job.adapter for job in jobs]
        batched = self.decoder.layout.mode == "batched"
        cache = self.decoder.start(width + max(job.sampling.max_tokens for job in jobs), rows if batched else rows[0])
        logits = self.decoder.step(cache, ids, mask)
        for row, job in enumerate(jobs):
            if job.scored:
                job.prompt_logprobs = prompt_logprobs(logits[row, width - len(job.ids) :], job.ids)
        answers = [_Answer(job, self.stops) for job in jobs]
        while True:
            going = [answer.add(logits[row, -1]) for row, answer in enumerate(answers)]
            if not any(going):
                return
            mask = np.concatenate([mask, np.ones((len(jobs), 1), np.int64)], 1)
            logits = self.decoder.step(cache, np.asarray([[answer.last] for answer in answers]), mask)


class _Answer:
    """The tokens of one job; a finished job stays in its batch and gets no more tokens."""

    def __init__(self, job: Job, stops: Collection[int]) -> None:
        self.job, self.stops = job, stops
        self.choose: Callable[[Any], int] = make_chooser(job.sampling)
        self.count, self.last, self.going = 0, 0, True

    def add(self, logits: NDArray[np.float32]) -> bool:  # (vocabulary,)
        """Choose the next token; return False when the answer has ended."""
        if not self.going:
            return False
        if self.job.given_up:
            self.going = False
            return False
        self.last = self.choose(logits)
        self.count += 1
        self.job.put(Token(self.last, float(log_softmax(logits)[self.last])))
        self.going = self.last not in self.stops and self.count < self.job.sampling.max_tokens
        if not self.going:
            self.job.end()
        return self.going


def log_softmax(logits: Any) -> Any:
    """Return log-probabilities, float64, along the last axis."""
    import numpy as np

    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def prompt_logprobs(logits: Any, ids: list[int]) -> list[float]:
    """Return the log-probability of each of ids[1:] from logits (len(ids), vocabulary)."""
    scores = log_softmax(logits[:-1])
    return [float(row[token]) for row, token in zip(scores, ids[1:], strict=True)]
