"""Comparison of a running server with the live adapter: log-probabilities and greedy tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.combine.open_inputs import AdapterInput, open_pair, parts_of
from adapter_merge.errors import InputError, MismatchError, UnsupportedError
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.storage.checkpoint import read_json
from adapter_merge.verification.compare_logits import PROMPTS, token_paths
from adapter_merge.verification.compare_server import (
    DTYPES,
    Distance,
    Transcript,
    Verdict,
    compare_server,
    compute_expectations,
    judge,
)
from adapter_merge.verification.completions_client import CompletionsClient, ServedModel
from adapter_merge.verification.live_adapter import load_model, quiet_libraries
from adapter_merge.verification.live_model import trained_model

GENERATED = 32  # greedy tokens per prompt
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def verify_server(
    base: str | Path | None,
    adapter: AdapterInput,
    served: ServedModel,
    *,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    prompts: Sequence[str] | None = None,
    generated: int = GENERATED,
    tolerance: float | None = None,
    dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare the answers of the server `served` with those of `adapter`, or a Recipe, live and unmerged on `base`.

    prompts: texts; None: built-in texts, or random tokens where the base has no tokenizer. generated: greedy tokens per
    prompt. dtype: in which the server computes (float32, bfloat16, float16); None: the dtype of most of the base's
    weights. tolerance: the largest |d log-probability| that passes; None: measured in `dtype` (compare_server.py).
    progress: called with 1 for each prompt that was compared. Returns the report; "verdict" is PASS, FAIL, or
    INCONCLUSIVE where the adapter's effect on the prompts is too small to distinguish it from the base, and "passed" is
    true for PASS alone. Raises InputError for a server that cannot be reached, refuses the key, does not offer the
    model or tokenizes text differently from the base's tokenizer, and UnsupportedError for one without /v1/completions
    or log-probabilities.
    """
    if generated < 1:
        raise InputError(f"{generated} greedy tokens: there is nothing to compare", expected="1 or more")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(f"tolerance {tolerance}: wrong value", expected="a finite number above 0")
    client = CompletionsClient(served)
    offered = client.models()  # reports an unreachable server or a refused key before a model is loaded
    bound = open_pair(base, adapter, base_kind, options)
    chosen = dtype or _stored_dtype(bound)
    if chosen not in DTYPES:
        raise InputError(f"dtype {chosen}: unknown", expected=", ".join(DTYPES))
    tokenizer = _tokenizer(bound.base.folder)
    notes = _check_tokenizer(client, tokenizer, (prompts or PROMPTS)[0])
    if offered and served.model not in offered:
        notes.append(f"the server does not list {served.model!r}, but answers to it")
    transcripts = _transcripts(bound, prompts, generated)
    expected = compute_expectations(
        transcripts, lambda: load_model(bound.base), lambda wanted: trained_model(bound, wanted), chosen
    )
    text_of = None if tokenizer is None else lambda token: str(tokenizer.decode([token]))
    figures = compare_server(client, transcripts, expected, text_of, progress, _end_tokens(bound.base.folder))
    verdict = judge(figures, tolerance)
    problems = list(verdict.problems)
    if verdict.verdict == Verdict.FAIL and not verdict.is_base and chosen == "float32" and tolerance is None:
        notes.append("the server was assumed to compute in float32: state --dtype bfloat16 or float16 if it does not")
    return {
        "artefact": "server",
        "path": client.url,
        "model": served.model,
        "adapter": {
            "path": ", ".join(str(part.adapter.folder) for part in parts_of(bound)),
            "method": str(bound.adapter.method),
        },
        "base": {"path": str(bound.base.folder), "kind": bound.base_kind, "evidence": bound.evidence},
        "way": client.scoring,
        "dtype": chosen,
        "tolerance": _distance_as_json(verdict.tolerance),
        "log_probabilities": {
            "compared": figures.compared,
            "difference": _distance_as_json(figures.difference),
            "from_base": _distance_as_json(figures.from_base),
            "effect": _distance_as_json(figures.effect),
            "noise": _distance_as_json(figures.noise),
        },
        "greedy": {"equal": figures.greedy_equal, "total": figures.greedy_total},
        "notes": notes,
        "problems": problems,
        "verdict": verdict.verdict,
        "passed": verdict.verdict == Verdict.PASS,
    }


def _distance_as_json(distance: Distance) -> dict[str, float | None]:
    """Return the distance as JSON values, with None for infinity and NaN."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(distance).items()}


def _stored_dtype(bound: BoundAdapter) -> str:
    """Return the dtype of most of the base's matrices. Raises InputError where it is none of `STORED`."""
    names = Counter(ref.dtype for ref in bound.base.tensors.values() if len(ref.shape) > 1)
    stored = names.most_common(1)[0][0]
    if stored not in STORED:
        raise InputError(
            f"{bound.base.folder}: holds {stored}, which does not determine the dtype that a server computes in",
            hint=f"--dtype {'|'.join(DTYPES)}",
        )
    return STORED[stored]


def _transcripts(bound: BoundAdapter, prompts: Sequence[str] | None, generated: int) -> list[Transcript]:
    """Return each prompt with the live adapter's answer. Raises UnsupportedError for a model that generates no text."""
    transcripts = []
    for path in token_paths(bound, prompts, generated):
        if path.start == 0:
            raise UnsupportedError(
                f"{bound.base.folder}: generates no text, so no completions server can serve it",
                hint="verify the merged model's folder instead",
            )
        transcripts.append(Transcript(tuple(path.ids.tolist()), path.start + 1))
    return transcripts


def _end_tokens(folder: Path) -> frozenset[int]:
    """Return the token ids that end an answer, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        stated = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if stated is not None:
            return frozenset(stated if isinstance(stated, list) else [stated])
    return frozenset()


def _tokenizer(folder: Path) -> Any:
    """Return the base's tokenizer; None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    import transformers

    with quiet_libraries():
        return transformers.AutoTokenizer.from_pretrained(folder)


def _check_tokenizer(client: CompletionsClient, tokenizer: Any, text: str) -> list[str]:
    """Raise MismatchError where the server tokenizes `text` differently; return notes on what could not be checked.

    The comparison itself sends token ids, so it does not notice a wrong tokenizer, but a user's text would.
    """
    if tokenizer is None:
        return ["the base has no tokenizer: random tokens were compared, and the server's tokenizer was not checked"]
    count, ids = client.count_tokens(text)
    expected_ids = list(tokenizer(text)["input_ids"])
    if ids is None and count is None:
        return ["the server does not return the tokens of a text: its tokenizer was not checked"]
    if (ids is not None and ids != expected_ids) or (count is not None and count != len(expected_ids)):
        raise MismatchError(
            f"{client.url}: tokenizes text differently from the base's tokenizer",
            expected=f"{len(expected_ids)} tokens: {expected_ids[:12]}",
            got=f"{count} tokens" if ids is None else f"{len(ids)} tokens: {ids[:12]}",
            hint="does it serve another base?",
        )
    return []
