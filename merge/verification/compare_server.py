"""Comparison of a server's log-probabilities and greedy tokens with those of the adapter as trained and of the base.

The tolerance is measured. The adapter as trained (live_adapter.py) runs in the server's dtype and in a wider one; the
server's distance from the wider one may be a few times that of the narrower one. The distance of the base on the same
tokens, the adapter's effect, must exceed MARGIN tolerances. The distance of a server that ignores the adapter is then
at least MARGIN - 1 tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

import torch
from torch import Tensor, nn

from .completions_client import CompletionsClient, Continuation

FLOOR = 1e-4  # smallest tolerance: the difference between engines in float32
# Allowed ratio of the server's distance from exact arithmetic to that of transformers in the same dtype. Measured for
# vLLM on a CPU in bfloat16: 0.7 to 0.9.
NOISE_OF_MAX, NOISE_OF_MEAN = 3.0, 2.0
MARGIN = 4.0  # smallest ratio of the adapter's effect to the tolerance
WIDER = {"float32": torch.float64, "bfloat16": torch.float32, "float16": torch.float32}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Transcript:
    """A prompt with the adapter's answer: ids (T,), of which the first `start` are the prompt."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Expectation:
    """The results of three models for one transcript: log-probabilities (T - 1,) of ids[1:], float64."""

    base: Tensor
    trained: Tensor
    narrow: Tensor  # the adapter as trained in the server's dtype
    greedy: tuple[int, ...]  # the trained adapter's greedy tokens after the prompt
    followed: int  # how many of them the transcript holds: all, or all but the last
    after: Tensor  # (len(greedy), vocabulary): the trained adapter's log-probabilities there


@dataclass(frozen=True)
class Distance:
    """Max and mean |d log-probability| over the compared tokens."""

    max: float
    mean: float


@dataclass(frozen=True)
class ServerFigures:
    """Differences between the server, the adapter as trained and the base, on the same tokens."""

    compared: int  # log-probabilities
    difference: Distance  # server to adapter as trained
    from_base: Distance  # server to base
    effect: Distance  # base to adapter as trained
    noise: Distance  # adapter as trained: the server's dtype to the wider one
    greedy_equal: int
    greedy_total: int  # up to the first token that differs, which ends a prompt's comparison
    greedy_gaps: tuple[float, ...]  # where one differs: by how much the adapter as trained prefers its own


@torch.no_grad()
def compute_expectations(
    transcripts: Sequence[Transcript],
    base: Callable[[], nn.Module],
    live: Callable[[torch.dtype], nn.Module],
    dtype: str,
) -> list[Expectation]:
    """Compute the results of base and adapter for each transcript, with one model in memory at a time.

    base, live: return the models.
    """
    wide = WIDER[dtype]
    narrow = [
        _score_tokens(_compute_logits(model, transcript), transcript)
        for model in (live(DTYPES[dtype]),)
        for transcript in transcripts
    ]
    before = [
        _score_tokens(_compute_logits(model, transcript), transcript)
        for model in (base().to(wide),)
        for transcript in transcripts
    ]
    expectations = []
    model = live(wide)
    for transcript, rounded, plain in zip(transcripts, narrow, before, strict=True):
        logits = _compute_logits(model, transcript)
        answer = torch.tensor(transcript.ids[transcript.start :])
        best = logits[transcript.start - 1 : -1].argmax(-1)
        followed = int((best == answer).int().cumprod(0).sum())
        # Where a token was suppressed (an early end of sequence) the generation is no longer greedy: end there.
        greedy = best[: followed + 1]
        after = logits[transcript.start - 1 : transcript.start - 1 + len(greedy)].log_softmax(-1)
        scores = _score_tokens(logits, transcript)
        expectations.append(Expectation(plain, scores, rounded, tuple(greedy.tolist()), followed, after))
    return expectations


def _compute_logits(model: nn.Module, transcript: Transcript) -> Tensor:
    """Return the logits (T, vocabulary), float64."""
    ids = torch.tensor([transcript.ids])
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0].double()


def _score_tokens(logits: Tensor, transcript: Transcript) -> Tensor:
    """Return (T - 1,): the log-probability of each token after the first; -inf for tokens outside the vocabulary."""
    scores = torch.full((len(transcript.ids) - 1,), -math.inf, dtype=torch.float64)
    ids = torch.tensor(transcript.ids[1:])
    known = ids < logits.shape[-1]
    rows = logits[:-1].log_softmax(-1)
    scores[known] = rows[known].gather(1, ids[known, None])[:, 0]
    return scores


def compare_server(
    client: CompletionsClient,
    transcripts: Sequence[Transcript],
    expected: Sequence[Expectation],
    text_of: Callable[[int], str] | None,
    progress: Callable[[int], None] | None = None,
    ends: frozenset[int] = frozenset(),
) -> ServerFigures:
    """Query the server for every transcript: its greedy tokens, then its log-probabilities of the transcript.

    text_of: returns a token id's text, for servers that return no ids. ends: the end-of-sequence tokens, which a server
    may leave out of its answer.
    """
    server: list[float] = []
    rows: list[Tensor] = []  # (3, n): base, trained, narrow
    equal, total = 0, 0
    gaps: list[float] = []
    for transcript, want in zip(transcripts, expected, strict=True):
        models = torch.stack((want.base, want.trained, want.narrow))
        made = client.generate(transcript.ids[: transcript.start], len(want.greedy))
        same, gap = _compare_greedy(made, want, text_of, ends)
        equal += same
        total += same + (gap is not None)
        gaps += [gap] if gap is not None else []
        on_it = min(same, want.followed)
        server += made.logprobs[:on_it]
        rows.append(models[:, transcript.start - 1 : transcript.start - 1 + on_it])
        scored = client.score(transcript.ids)
        if scored is not None:
            server += scored
            rows.append(models)
        if progress is not None:
            progress(1)
    base, trained, narrow = torch.cat(rows, dim=1)
    got = torch.tensor(server, dtype=torch.float64)
    return ServerFigures(
        len(server),
        _measure_distance(got, trained),
        _measure_distance(got, base),
        _measure_distance(base, trained),
        _measure_distance(narrow, trained),
        equal,
        total,
        tuple(gaps),
    )


def _measure_distance(first: Tensor, second: Tensor) -> Distance:
    """Return max and mean |first - second|; NaN for empty tensors."""
    if not first.numel():
        return Distance(math.nan, math.nan)
    apart = (first - second).abs()
    return Distance(float(apart.max()), fmean(apart.tolist()))


def _compare_greedy(
    made: Continuation, want: Expectation, text_of: Callable[[int], str] | None, ends: frozenset[int]
) -> tuple[int, float | None]:
    """Return (number of equal tokens, gap at the first different one); the gap is inf for an unknown token."""
    for place, token in enumerate(want.greedy):
        if place >= len(made.ids):
            # Some servers leave the end-of-sequence token out; the adapter must end there with one as well.
            return place, None if made.stopped and token in ends and place == len(want.greedy) - 1 else math.inf
        got = made.ids[place]
        if got is None and text_of is not None and made.texts[place] == text_of(token):
            got = token
        if got != token:
            known = got is not None and 0 <= got < want.after.shape[-1]
            return place, float(want.after[place, token] - want.after[place, got]) if known else math.inf
    return len(want.greedy), None


class Verdict(StrEnum):
    """The values are shown to users and written to reports."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"  # a server without the adapter could not be told from one with it


@dataclass(frozen=True)
class ServerVerdict:
    """The verdict on a server, with the tolerance of max and mean |d log-probability| and the problems."""

    tolerance: Distance
    verdict: Verdict
    problems: tuple[str, ...]
    is_base: bool = False  # the answers match the base


def judge(figures: ServerFigures, tolerance: float | None = None) -> ServerVerdict:
    """Return the verdict: PASS only where server and adapter agree, and a server without the adapter would not."""
    noise = figures.noise
    bar = (
        Distance(tolerance, tolerance)
        if tolerance is not None
        else Distance(_choose_tolerance(NOISE_OF_MAX * noise.max), _choose_tolerance(NOISE_OF_MEAN * noise.mean))
    )
    if not figures.compared or not figures.greedy_total:
        return ServerVerdict(bar, Verdict.FAIL, ("nothing was compared: the server gave no log-probability",))
    problems = []
    difference = figures.difference
    if not (difference.max <= bar.max and difference.mean <= bar.mean):
        problems.append(
            f"log-probabilities differ by up to {difference.max:.3g} (mean {difference.mean:.3g}); "
            f"{bar.max:.3g} (mean {bar.mean:.3g}) is allowed"
        )
    wrong = [gap for gap in figures.greedy_gaps if not gap <= 2 * bar.max]
    if wrong:
        problems.append(f"greedy tokens differ in {len(wrong)} answers, where the adapter's own is clearly preferred")
    separate = figures.effect.max >= MARGIN * bar.max or figures.effect.mean >= MARGIN * bar.mean
    if problems:
        base = figures.from_base
        is_base = separate and base.max <= bar.max and base.mean <= bar.mean
        if is_base:
            problems.insert(0, "the answers are the base's: the server ignores the adapter")
        return ServerVerdict(bar, Verdict.FAIL, tuple(problems), is_base)
    if not separate:
        return ServerVerdict(
            bar,
            Verdict.INCONCLUSIVE,
            (
                f"the adapter moves these log-probabilities by only {figures.effect.max:.3g} "
                f"(mean {figures.effect.mean:.3g}), and {bar.max:.3g} (mean {bar.mean:.3g}) is allowed: "
                "the base cannot be distinguished from it. Give a --prompt that it was trained for",
            ),
        )
    return ServerVerdict(bar, Verdict.PASS, ())


def _choose_tolerance(noise: float) -> float:
    """Return the tolerance for a measured noise, at least FLOOR."""
    return max(FLOOR, noise) if math.isfinite(noise) else FLOOR
