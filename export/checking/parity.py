"""The check that ends every export: its logits against the live model, for the base and for every adapter.

The live model is transformers' own, with the adapter unmerged in it, streamed part by part (streamed_model.py).
Nothing is read from the export but its answers. Two texts per adapter: one from the first position on, its second
half token by token through the KV cache; and one behind a KV cache of random values, which reaches the positions past
the original context length (or near the end of it) at the cost of a few tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.export.engine.decoder_session import Decoder
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.verification.key_value_cache import cache_argument

from .encoder_verification import check_encoder, has_body
from .verdict import BARS, sample_tokens, verdict

if TYPE_CHECKING:
    from adapter_merge.combine.recipe import Recipe
    from adapter_merge.export.building.checks_before_build import Request

NEAR = (24, 16)  # tokens at once, then singly
FAR = (8, 4)
FAR_BYTES = 1 << 28  # of keys and values before the far text
FAR_NOISE = 10.0  # bar of the far text: random keys and values are unlike any that a model was trained to add up
LOUD = 16.0  # logits above this raise the bar in proportion: float32 has a relative error


@dataclass(frozen=True)
class Text:
    """Token ids, of which `prompt` go in at once, behind `before` positions of random keys and values."""

    ids: tuple[int, ...]
    prompt: int
    before: int


def check_decoder_parity(request: Request, folder: Path, manifest: Manifest, recipe: Recipe | None = None) -> None:
    """Compare the decoder in `folder` with the live model; add the figures to `manifest`.

    Raises MismatchError, with every adapter that differs, so that nothing is published.
    """
    if not request.check:
        return
    references: dict[str, Any] = {}
    if manifest.mode == "merged" and request.adapters:
        adapter = recipe or _sum_of(request.adapters)
        references["merged"] = open_pair(request.checkpoint.folder, adapter)
    else:
        references["base"] = None
        for name, source in request.adapters.items():
            references[name] = open_pair(request.checkpoint.folder, source)
    decoder = Decoder(folder)
    manifest.parity |= compare_all(decoder, request.checkpoint.folder, references, manifest.precision, request.say)


def _sum_of(adapters: Mapping[str, Path]) -> Any:
    from adapter_merge.combine.delta_ops import Settings
    from adapter_merge.combine.recipe import Ingredient, make_recipe

    if len(adapters) == 1:
        return next(iter(adapters.values()))
    return make_recipe([Ingredient(name, str(path)) for name, path in adapters.items()], Settings())


def compare_all(
    decoder: Decoder, base: Path, references: Mapping[str, Any], precision: str, say: Any
) -> dict[str, dict[str, Any]]:
    """Return the figures of every name in `references` (bound adapter, or None for the base).

    int4 has no bar: quantisation moves logits by whole units. Its figures must be finite, and are recorded.
    Raises MismatchError when one differs.
    """
    texts, covered = make_texts(decoder, base)
    figures: dict[str, dict[str, Any]] = {}
    problems = []
    plain: list[Any] = []
    for count, (name, bound) in enumerate({"base": None, **references}.items(), start=1):
        if name in references:
            say(f"checking {name} against the live model ({count} of {len({'base': None, **references})})")
        expected = live_logits(base, bound, texts, decoder)
        if bound is None:
            plain = expected
        if name not in references:
            continue
        adapter = None if name in ("base", "merged") else name
        got = [export_logits(decoder, adapter, text) for text in texts]
        result = _verdict(expected[:1], got[:1], plain[:1], precision)
        figures[name] = {**result["logits"], "tolerance": result["tolerance"], "past_context": covered}
        found = list(result["problems"])
        if len(texts) > 1:
            far = _verdict(expected[1:], got[1:], plain[1:], precision, FAR_NOISE)
            figures[name]["far_difference"] = far["logits"]["max_difference"]
            found += [f"{problem}, behind a cache of {texts[1].before} random positions" for problem in far["problems"]]
        problems += [Problem(f"the export does not compute {name}: {problem}") for problem in found]
    if problems:
        raise_all(
            [*problems, Problem("nothing was written", hint="--no-check writes the export without the check")],
            MismatchError,
        )
    return figures


def _verdict(
    expected: list[Any], got: list[Any], plain: list[Any], precision: str, noise: float = 1.0
) -> dict[str, Any]:
    import numpy as np

    loudest = max(float(np.abs(logits).max()) for logits in expected)
    bar = BARS.get(precision, float("inf")) * max(1.0, loudest / LOUD) * noise
    result = verdict(expected, got, plain, bar)
    if precision not in BARS:
        result["problems"] = [] if np.isfinite(result["logits"]["max_difference"]) else ["its logits are not finite"]
        result["tolerance"] = None
    return result


def make_texts(decoder: Decoder, base: Path) -> tuple[list[Text], bool]:
    """Return the texts to compare over, and whether they reach past the original context length."""
    from adapter_merge.verification.live_adapter import model_config

    config = model_config(base).get_text_config()
    vocabulary, limit = int(config.vocab_size), decoder.context_length or int(config.max_position_embeddings)
    original = original_context(config)
    length = min(sum(NEAR), limit)
    ids = sample_tokens(vocabulary, 512)
    texts = [Text(tuple(ids[:length]), max(1, min(NEAR[0], length // 2)), 0)]
    wanted = original if original < limit else limit - sum(FAR)
    if original < limit:
        wanted = min(original + 1, limit - sum(FAR))
    before = min(wanted, FAR_BYTES // decoder.bytes_per_position)
    if before > length:
        texts.append(Text(tuple(ids[100 : 100 + sum(FAR)]), FAR[0], before))
    return texts, before + sum(FAR) > original


def original_context(config: Any) -> int:
    """Return the context length that the base was trained with before its rotary positions were scaled."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    limit = int(config.max_position_embeddings)
    lengths = [int(value.get("original_max_position_embeddings") or limit) for value in nested]
    return min([limit, *lengths])


def live_logits(base: Path, bound: Any, texts: list[Text], decoder: Decoder) -> list[Any]:
    """Return logits (positions, vocabulary), float32, of the live model over every text."""
    import torch
    from transformers import DynamicCache

    from adapter_merge.quantisation.dense_view import open_base
    from adapter_merge.verification.live_model import trained_model
    from adapter_merge.verification.streamed_adapter import streamed_base, streamed_trained

    gc.collect()
    if isinstance(bound, CombinedBound):
        model: Any = trained_model(bound)
    elif bound is None:
        model = streamed_base(open_base(base), torch.float32).model
    else:
        model = streamed_trained(bound, torch.float32).model
    answers = []
    for text in texts:
        cache = None
        if text.before:
            cache = DynamicCache(config=model.config.get_text_config())
            past = decoder.random_past(text.before)
            for layer in range(len(past) // 2):
                key, value = (torch.from_numpy(past[f"past_key_values.{layer}.{kind}"]) for kind in ("key", "value"))
                cache.update(key, value, layer)
        with torch.no_grad():
            result = model(input_ids=torch.tensor([text.ids]), **cache_argument(cache), use_cache=cache is not None)
        answers.append(result.logits[0].float().numpy())
    return answers


def export_logits(decoder: Decoder, adapter: str | None, text: Text) -> Any:
    """Return logits (positions, vocabulary), float32, of the export, through its KV cache."""
    import numpy as np

    ids = np.asarray([text.ids], np.int64)
    cache = decoder.start(text.before + len(text.ids), adapter, past=text.before)
    rows = [decoder.step(cache, ids[:, : text.prompt])[0]]
    rows.extend(decoder.step(cache, ids[:, index : index + 1])[0] for index in range(text.prompt, len(text.ids)))
    return np.concatenate(rows)


def check_encoder_parity(request: Request, folder: Path, manifest: Manifest, recipe: Recipe | None = None) -> None:
    """Compare the encoder in `folder` with the live model, as check_decoder_parity does."""
    if not request.check:
        return
    base = request.checkpoint.folder
    references: dict[str, Any] = {}
    if manifest.mode == "merged" and request.adapters:
        references["merged"] = open_pair(base, recipe or _sum_of(request.adapters))
    else:
        if has_body(request.checkpoint, manifest.options["class"]):
            references["base"] = None  # without a head of its own its answers are those of random weights
        for name, source in request.adapters.items():
            references[name] = open_pair(base, source)
    manifest.parity |= compare_encoders(base, references, folder, manifest, request.say)


def compare_encoders(
    base: Path,
    references: Mapping[str, Any],
    folder: Path,
    manifest: Manifest,
    say: Any,
    files: Mapping[str, Path] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the figures of every name in `references` for an encoder (files: where adapters lie, if not in place).

    Raises UnsupportedError where the base has no head of the exported class, and MismatchError when one differs.
    """
    from adapter_merge.export.engine.encoder_session import Classifier

    classifier = Classifier(folder)
    for name, file in (files or {}).items():
        classifier.load_file(name, file)
    figures: dict[str, dict[str, Any]] = {}
    problems = []
    for count, (name, bound) in enumerate(references.items(), start=1):
        say(f"checking {name} against the live model ({count} of {len(references)})")
        adapter = None if name in ("base", "merged") else name
        result = check_encoder(base, bound, classifier, adapter, manifest)
        figures[name] = {**result["logits"], "tolerance": result["tolerance"]}
        problems += [Problem(f"the export does not compute {name}: {text}") for text in result["problems"]]
    if problems:
        raise_all(
            [*problems, Problem("nothing was written", hint="--no-check writes the export without the check")],
            MismatchError,
        )
    return figures
