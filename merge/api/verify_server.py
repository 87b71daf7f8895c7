"""Proof that a running server answers as the adapter was trained to: log-probabilities and greedy tokens."""

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
from adapter_merge.formats.read_options import ReadOptions
from adapter_merge.storage.checkpoint import read_json
from adapter_merge.verification.compare_logits import PROMPTS, token_paths
from adapter_merge.verification.compare_server import DTYPES, Distance, Transcript, compare_server, expect, judge
from adapter_merge.verification.completions_client import CompletionsClient, ServedModel
from adapter_merge.verification.live_adapter import load_model, quiet_libraries
from adapter_merge.verification.live_model import trained_model

GENERATED = 32
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
    """Compare what `served` answers with `adapter`, or a Recipe, live and unmerged on `base`.

    prompts: texts; built-in ones when None, random tokens where the base has no tokenizer. generated: greedy tokens
    per prompt. dtype: what the server computes in (float32, bfloat16, float16); the adapted weights' own when None.
    tolerance: for max |d log-probability|; measured in `dtype` when None (compare_server.py).
    progress: called with 1 for each prompt that was compared.
    Returns the report; "verdict" is PASS, FAIL, or INCONCLUSIVE where the adapter's effect on the prompts is too small
    to tell it from the base, and "passed" is true for PASS alone. Raises InputError for a server that cannot be
    reached, refuses the key, does not offer the model or reads text as other tokens than the base's tokenizer, and
    UnsupportedError for one without /v1/completions or log-probabilities.
    """
    if generated < 1:
        raise InputError(f"{generated} greedy tokens: nothing to compare", expected="1 or more")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(f"tolerance {tolerance}: not a bound", expected="a finite number above 0")
    client = CompletionsClient(served)
    offered = client.models()  # an unreachable server, or a refused key, is told before any model is loaded
    bound = open_pair(base, adapter, base_kind, options)
    chosen = dtype or _stored_dtype(bound)
    if chosen not in DTYPES:
        raise InputError(f"dtype {chosen}: unknown", expected=", ".join(DTYPES))
    tokenizer = _tokenizer(bound.base.folder)
    notes = _check_tokenizer(client, tokenizer, (prompts or PROMPTS)[0])
    if offered and served.model not in offered:
        notes.append(f"the server does not list {served.model!r}, but answers to it")
    transcripts = _transcripts(bound, prompts, generated)
    expected = expect(transcripts, lambda: load_model(bound.base), lambda wanted: trained_model(bound, wanted), chosen)
    text_of = None if tokenizer is None else lambda token: str(tokenizer.decode([token]))
    figures = compare_server(client, transcripts, expected, text_of, progress, _end_tokens(bound.base.folder))
    verdict = judge(figures, tolerance)
    problems = list(verdict.problems)
    if verdict.verdict == "FAIL" and not verdict.is_base and chosen == "float32" and tolerance is None:
        notes.append(
            "compared with a server that computes in float32; --dtype bfloat16 or float16 for one that does not"
        )
    return {
        "artefact": "server",
        "path": client.url,
        "model": served.model,
        "adapter": {
            "path": ", ".join(str(part.adapter.folder) for part in parts_of(bound)),
            "method": bound.adapter.method,
        },
        "base": {"path": str(bound.base.folder), "kind": bound.base_kind, "evidence": bound.evidence},
        "way": client.way,
        "dtype": chosen,
        "tolerance": _plain(verdict.tolerance),
        "log_probabilities": {
            "compared": figures.compared,
            "difference": _plain(figures.difference),
            "from_base": _plain(figures.from_base),
            "effect": _plain(figures.effect),
            "noise": _plain(figures.noise),
        },
        "greedy": {"equal": figures.greedy_equal, "total": figures.greedy_total},
        "notes": notes,
        "problems": problems,
        "verdict": verdict.verdict,
        "passed": verdict.verdict == "PASS",
    }


def _plain(found: Distance) -> dict[str, float | None]:
    """As JSON, which has no infinity."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(found).items()}


def _stored_dtype(bound: BoundAdapter) -> str:
    """The dtype of most adapted weights. Raises InputError where it is none that a reference can run in."""
    names = Counter(ref.dtype for ref in bound.base.tensors.values() if len(ref.shape) > 1)
    stored = names.most_common(1)[0][0]
    if stored not in STORED:
        raise InputError(
            f"{bound.base.folder}: holds {stored}, which does not tell what a server computes in",
            hint=f"--dtype {'|'.join(DTYPES)}",
        )
    return STORED[stored]


def _transcripts(bound: BoundAdapter, prompts: Sequence[str] | None, generated: int) -> list[Transcript]:
    """The prompts, each with the adapter's own answer. Raises UnsupportedError for a model that writes no text."""
    found = []
    for path in token_paths(bound, prompts, generated):
        if path.start == 0:
            raise UnsupportedError(
                f"{bound.base.folder}: writes no text, so that no completions server serves it",
                hint="verify the merged model's folder instead",
            )
        found.append(Transcript(tuple(path.ids.tolist()), path.start + 1))
    return found


def _end_tokens(folder: Path) -> frozenset[int]:
    """The token ids that end an answer, as generation_config.json states them, else config.json."""
    for name in ("generation_config.json", "config.json"):
        stated = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if stated is not None:
            return frozenset(stated if isinstance(stated, list) else [stated])
    return frozenset()


def _tokenizer(folder: Path) -> Any:
    """The base's tokenizer, None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    import transformers

    with quiet_libraries():
        return transformers.AutoTokenizer.from_pretrained(folder)


def _check_tokenizer(client: CompletionsClient, tokenizer: Any, text: str) -> list[str]:
    """Raise MismatchError when the server reads `text` as other tokens; what could not be checked, as notes.

    The comparison itself sends token ids. But a server that makes other tokens of a user's text serves another model.
    """
    if tokenizer is None:
        return ["the base has no tokenizer: random tokens were compared, and the server's tokenizer was not"]
    count, ids = client.count_tokens(text)
    wanted = list(tokenizer(text)["input_ids"])
    if ids is None and count is None:
        return ["the server does not say how it reads text: its tokenizer was not compared"]
    if (ids is not None and ids != wanted) or (count is not None and count != len(wanted)):
        raise MismatchError(
            f"{client.url}: reads text with another tokenizer than the base's",
            expected=f"{len(wanted)} tokens: {wanted[:12]}",
            got=f"{count} tokens" if ids is None else f"{len(ids)} tokens: {ids[:12]}",
            hint="does it serve another base?",
        )
    return []
