"""A request to an engine and its answer: the tokens that the engine's thread passes to the reader's thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass, field

from adapter_merge.export.engine.prompting import Sampling


@dataclass(frozen=True)
class Token:
    """A generated token, with its log-probability in the model's distribution at temperature 1."""

    id: int
    logprob: float


@dataclass(eq=False)
class Job:
    """A request to an engine. The requesting thread reads `tokens`; the engine's thread calls all other methods."""

    ids: list[int]  # the prompt
    adapter: str | None
    sampling: Sampling
    scored: bool = False  # log-probabilities of the prompt are wanted
    prompt_logprobs: list[float] = field(default_factory=list)  # of ids[1:], known before the first token
    _tokens: queue.SimpleQueue[Token | Exception | None] = field(default_factory=queue.SimpleQueue)
    _given_up: threading.Event = field(default_factory=threading.Event)

    def put(self, token: Token) -> None:
        """Pass the next token to the reader."""
        self._tokens.put(token)

    def end(self, error: Exception | None = None) -> None:
        """End the answer, with an error where one is given."""
        self._tokens.put(error)

    @property
    def given_up(self) -> bool:
        """True when the reader has stopped reading."""
        return self._given_up.is_set()

    def tokens(self) -> Generator[Token, None, None]:
        """Yield the tokens; a reader that stops early also stops the engine. Raises the engine's error."""
        try:
            while (item := self._tokens.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._given_up.set()
