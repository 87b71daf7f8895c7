"""The thread that answers requests: which waiting requests form one batch, and how onnxruntime runs it.

A model never runs two jobs at once. In a batched export all waiting jobs form one padded batch, every row with its own
adapter; later jobs wait until the batch has ended. Other exports, and onnxruntime-genai (genai_engine.py), answer one
job after the other.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from adapter_merge.errors import AdapterMergeError
from adapter_merge.export.engine.decoder_session import Decoder

from .answer_tokens import Answer, prompt_logprobs
from .engine_job import Job

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
        answers = [Answer(job, self.stops) for job in jobs]
        while True:
            going = [answer.add(logits[row, -1]) for row, answer in enumerate(answers)]
            if not any(going):
                return
            mask = np.concatenate([mask, np.ones((len(jobs), 1), np.int64)], 1)
            logits = self.decoder.step(cache, np.asarray([[answer.last] for answer in answers]), mask)
