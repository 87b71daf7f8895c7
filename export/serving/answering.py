"""From tokens to text: stop texts, log-probabilities and the reason of an answer's end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from .job import Job, Token


@dataclass
class Answer:
    """What has been said so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str = "length"


def pieces(
    job: Job, push: Callable[[int], str], stops: Collection[int], texts: Collection[str], answer: Answer
) -> Iterator[str]:
    """Yield the text of `job` as it is certain, and keep what was said in `answer`.

    push: from the next token to the text that it completes. stops: tokens that end an answer, without a text. texts:
    stop texts; what could begin one is held back until it is certain.
    """
    held, longest = "", max((len(text) for text in texts), default=1) - 1
    with closing(job.tokens()) as made:
        for token in made:
            answer.tokens.append(token)
            if token.id in stops:
                answer.reason = "stop"
                break
            held += push(token.id)
            found = [place for text in texts if (place := held.find(text)) >= 0]
            if found:
                held, answer.reason = held[: min(found)], "stop"
                break
            certain = len(held) - longest
            if certain > 0:
                answer.text += held[:certain]
                yield held[:certain]
                held = held[certain:]
    answer.text += held
    if held:
        yield held
