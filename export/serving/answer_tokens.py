"""The tokens of one answer: chosen from logits until it ends; and log-probabilities of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from adapter_merge.export.engine.prompting import make_chooser

from .engine_job import Job, Token

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Answer:
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
