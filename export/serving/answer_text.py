"""The text of an answer, from its tokens: stop texts, and the reason why the answer ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from .engine_job import Job, Token


@dataclass
class Answer:
    """The text and tokens of an answer so far, and the reason of its end."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str = "length"


def stream_text(
    job: Job, push: Callable[[int], str], stops: Collection[int], texts: Collection[str], answer: Answer
) -> Iterator[str]:
    """Yield the text of `job` piece by piece, and record it in `answer`.

    push: maps the next token to the text that it completes. stops: tokens that end an answer and have no text. texts:
    stop texts; the end of the text is delayed while it could be the beginning of a stop text.
    """
    pending, longest = "", max((len(text) for text in texts), default=1) - 1
    with closing(job.tokens()) as tokens:
        for token in tokens:
            answer.tokens.append(token)
            if token.id in stops:
                answer.reason = "stop"
                break
            pending += push(token.id)
            stop_positions = [place for text in texts if (place := pending.find(text)) >= 0]
            if stop_positions:
                pending, answer.reason = pending[: min(stop_positions)], "stop"
                break
            certain = len(pending) - longest
            if certain > 0:
                answer.text += pending[:certain]
                yield pending[:certain]
                pending = pending[certain:]
    answer.text += pending
    if pending:
        yield pending
