"""The check at the end of every export: its logits are compared with those of the live models of base and adapters.

The live model is transformers' model with the unmerged adapter, streamed part by part (streamed_model.py). The check
runs the export and reads none of its weights. Two texts per adapter are compared. The first begins at position 0; its
second half is computed token by token with the KV cache. The second follows a KV cache of random values, so that a few
tokens suffice to compare positions past the original context length, or near the end of the context.
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
from .verdict import TOLERANCES, sample_tokens, verdict

if TYPE_CHECKING:
    from adapter_merge.combine.recipe import Recipe
    from adapter_merge.export.building.checks_before_build import Request

FIRST_TEXT = (24, 16)  # tokens in one step, then one token per step
FAR_TEXT = (8, 4)
RANDOM_CACHE_BYTES = 1 << 28  # largest size of the random keys and values before the far text
# Factor of the far text's tolerance: random keys and values have other magnitudes than those that a model computes.
FAR_FACTOR = 10.0
LARGE_LOGIT = 16.0  # logits of a larger magnitude raise the tolerance in proportion, as float32's error is relative


@dataclass(frozen=True)
class Text:
    """A text to compare over."""

    ids: tuple[int, ...]  # token ids
    prompt: int  # how many of them are computed in one step; the others are computed one per step
    before: int  # positions of random keys and values in the KV cache before the text


def check_decoder_parity(request: Request, folder: Path, manifest: Manifest, recipe: Recipe | None = None) -> None:
    """Compare the decoder in `folder` with the live models; add the figures to `manifest`.

    recipe: the combination that a merged export contains; None: the sum of the request's adapters. Does nothing for a
    request without check. Raises MismatchError, with every adapter that differs, so that the output is not published.
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
    """Return the one adapter, or the recipe of the sum of several."""
    from adapter_merge.combine.delta_ops import Settings
    from adapter_merge.combine.recipe import Ingredient, make_recipe

    if len(adapters) == 1:
        return next(iter(adapters.values()))
    return make_recipe([Ingredient(name, str(path)) for name, path in adapters.items()], Settings())


def compare_all(
    decoder: Decoder, base: Path, references: Mapping[str, Any], precision: str, say: Any
) -> dict[str, dict[str, Any]]:
    """Return the figures of every name in `references`, whose values are bound adapters (None: the base).

    An int4 export has no tolerance, because quantisation changes logits by whole units; its logits must be finite.
    say: called with a text for each step. Raises MismatchError, with every difference.
    """
    texts, covers_past_context = make_texts(decoder, base)
    figures: dict[str, dict[str, Any]] = {}
    problems = []
    base_logits: list[Any] = []
    for count, (name, bound) in enumerate({"base": None, **references}.items(), start=1):
        if name in references:
            say(f"checking {name} against the live model ({count} of {len({'base': None, **references})})")
        expected = live_logits(base, bound, texts, decoder)
        if bound is None:
            base_logits = expected
        if name not in references:
            continue
        adapter = None if name in ("base", "merged") else name
        got = [export_logits(decoder, adapter, text) for text in texts]
        result = _verdict(expected[:1], got[:1], base_logits[:1], precision)
        figures[name] = {**result["logits"], "tolerance": result["tolerance"], "past_context": covers_past_context}
        differences = list(result["problems"])
        if len(texts) > 1:
            far = _verdict(expected[1:], got[1:], base_logits[1:], precision, FAR_FACTOR)
            figures[name]["far_difference"] = far["logits"]["max_difference"]
            differences += [
                f"{problem}, after a cache of {texts[1].before} random positions" for problem in far["problems"]
            ]
        problems += [Problem(f"the export does not compute {name}: {problem}") for problem in differences]
    if problems:
        raise_all(
            [*problems, Problem("nothing was written", hint="--no-check writes the export without the check")],
            MismatchError,
        )
    return figures


def _verdict(
    expected: list[Any], got: list[Any], base_logits: list[Any], precision: str, factor: float = 1.0
) -> dict[str, Any]:
    """Return verdict.verdict under the tolerance of the precision, times `factor`; int4: finite logits suffice."""
    import numpy as np

    largest = max(float(np.abs(logits).max()) for logits in expected)
    tolerance = TOLERANCES.get(precision, float("inf")) * max(1.0, largest / LARGE_LOGIT) * factor
    result = verdict(expected, got, base_logits, tolerance)
    if precision not in TOLERANCES:
        result["problems"] = [] if np.isfinite(result["logits"]["max_difference"]) else ["its logits are not finite"]
        result["tolerance"] = None
    return result


def make_texts(decoder: Decoder, base: Path) -> tuple[list[Text], bool]:
    """Return the texts to compare over, and True where they exceed the original context length."""
    from adapter_merge.verification.live_adapter import model_config

    config = model_config(base).get_text_config()
    vocabulary, limit = int(config.vocab_size), decoder.context_length or int(config.max_position_embeddings)
    original = original_context(config)
    length = min(sum(FIRST_TEXT), limit)
    ids = sample_tokens(vocabulary, 512)
    texts = [Text(tuple(ids[:length]), max(1, min(FIRST_TEXT[0], length // 2)), 0)]
    wanted = original if original < limit else limit - sum(FAR_TEXT)
    if original < limit:
        wanted = min(original + 1, limit - sum(FAR_TEXT))
    before = min(wanted, RANDOM_CACHE_BYTES // decoder.bytes_per_position)
    if before > length:
        texts.append(Text(tuple(ids[100 : 100 + sum(FAR_TEXT)]), FAR_TEXT[0], before))
    return texts, before + sum(FAR_TEXT) > original


def original_context(config: Any) -> int:
    """Return the context length of the base's training, before the rotary positions were scaled to a longer one."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    limit = int(config.max_position_embeddings)
    lengths = [int(value.get("original_max_position_embeddings") or limit) for value in nested]
    return min([limit, *lengths])


def live_logits(base: Path, bound: Any, texts: list[Text], decoder: Decoder) -> list[Any]:
    """Return logits (positions, vocabulary) in float32 of the live model for every text; bound: None for the base."""
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
    logits = []
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
        logits.append(result.logits[0].float().numpy())
    return logits


def export_logits(decoder: Decoder, adapter: str | None, text: Text) -> Any:
    """Return logits (positions, vocabulary) in float32 of the export, computed with its KV cache."""
    import numpy as np

    ids = np.asarray([text.ids], np.int64)
    cache = decoder.start(text.before + len(text.ids), adapter, past=text.before)
    rows = [decoder.step(cache, ids[:, : text.prompt])[0]]
    rows.extend(decoder.step(cache, ids[:, index : index + 1])[0] for index in range(text.prompt, len(text.ids)))
    return np.concatenate(rows)


def check_encoder_parity(request: Request, folder: Path, manifest: Manifest, recipe: Recipe | None = None) -> None:
    """Compare the encoder in `folder` with the live models, as check_decoder_parity does."""
    if not request.check:
        return
    base = request.checkpoint.folder
    references: dict[str, Any] = {}
    if manifest.mode == "merged" and request.adapters:
        references["merged"] = open_pair(base, recipe or _sum_of(request.adapters))
    else:
        if has_body(request.checkpoint, manifest.options["class"]):
            references["base"] = None  # a base without a head would be compared with a random head
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
    """Return the figures of every name in `references` for an encoder, as compare_all does for a decoder.

    files: files of adapters that are not in `folder`, by name. Raises UnsupportedError where the base has no weights of
    the exported class, and MismatchError, with every difference.
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
