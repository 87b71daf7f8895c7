"""Parity of an ONNX export with the adapters as trained: logits computed with the KV cache.

The weights of what torch.onnx traced (encoders, GPT-2) are compared as well, see traced_proof.py.
Every text runs through torch at once, with the adapter live and unmerged (PEFT, or the method's own forward),
and through the export as a server would: the prompt in one step, then token by token. Compared are all logits of
both phases, and the greedy choice at every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError
from adapter_merge.export.engine.decoder_session import Decoder
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.contents import folder_layout, read_export
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.verification.key_value_cache import cache_argument, cache_of

from .encoder_verification import verify_encoder
from .traced_proof import is_traced, verify_traced_weights
from .verdict import BARS, TOKENS, check_base, find_adapter, header, reference_model, sample_tokens, verdict

PROMPT = 96  # of them in prefill
GENERATED = 64  # greedy tokens after each prompt


def verify_onnx(
    base: str | Path,
    adapter: str | Path | None,
    artefact: str | Path,
    *,
    name: str | None = None,
    prompts: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    generated: int = GENERATED,
    device: str = "cpu",
    bar: float | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> dict[str, Any]:
    """Compare the export in `artefact` with `adapter` on `base` as trained (None: with the base alone).

    name: the adapter's name in a switchable or batched export; found by its source path when not given. prompts:
    texts, each followed by the `generated` tokens that torch chooses; tokens: ids to compare over; 256 deterministic
    pseudo-random ids when neither is given. bar: the largest difference of a logit that passes; by precision when
    not given (fp32 1e-3), but an int4 export needs one: quantisation moves logits by whole units. base_kind and
    options: what was stated of the adapter beyond its files.

    Returns figures, "problems" and "passed". Raises InputError or MismatchError when the three do not belong
    together.
    """
    folder = Path(artefact)
    check_packages("onnx_ir", "transformers")
    manifest = read_export(folder)
    if bar is None and manifest.precision not in BARS:
        raise InputError(
            f"{folder}: an {manifest.precision} export differs from what was trained by its quantisation",
            hint="say how large a difference of a logit may be: --tolerance",
        )
    if manifest.kind != "decoder":
        if prompts:
            raise InputError(f"{folder}: a classifier is compared on token ids", hint="leave --prompt out")
        stated: dict[str, Any] = {"name": name, "base_kind": base_kind, "options": options}
        report = verify_encoder(base, adapter, folder, manifest, device=device, bar=bar, **stated)
        return with_weights(report, verify_traced_weights(base, adapter, folder, manifest, **stated))
    from adapter_merge.quantisation.dense_view import open_base

    checkpoint = open_base(base)
    layout = folder_layout(folder)
    check_base(folder, layout.base, checkpoint.fingerprint, base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    model = reference_model(base, adapter, base_kind, options)
    vocabulary = int(model.config.get_text_config().vocab_size)
    texts = token_lists(folder, model, prompts, tokens, vocabulary, generated)
    expected = [torch_logits(model, ids) for ids, _ in texts]
    del model
    plain = expected
    if adapter is not None:
        model = reference_model(base, None)
        plain = [torch_logits(model, ids) for ids, _ in texts]
        del model
    decoder = Decoder(folder, device)
    held_name = None if manifest.mode == "merged" else chosen
    got = [onnx_logits(decoder, held_name, ids, prompt) for ids, prompt in texts]
    prefill = sum(prompt for _, prompt in texts)
    positions = sum(len(ids) for ids, _ in texts)
    report = {
        **header(folder, manifest, chosen, adapter),
        "tokens": positions,
        "prefill_tokens": prefill,
        "decode_tokens": positions - prefill,
        **verdict(expected, got, plain, BARS.get(manifest.precision, 0.0) if bar is None else bar),
    }
    if not is_traced(manifest):
        return report
    return with_weights(
        report,
        verify_traced_weights(base, adapter, folder, manifest, name=name, base_kind=base_kind, options=options),
    )


def with_weights(report: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of logits with the figures and the problems of a comparison of weights."""
    problems = [*report["problems"], *weights["problems"]]
    compared = {key: weights[key] for key in ("layers", "compared", "notes")}
    return {**report, **compared, "problems": problems, "passed": not problems}


def token_lists(
    folder: Path,
    model: Any,
    prompts: Sequence[str] | None,
    tokens: Sequence[int] | None,
    vocabulary: int,
    generated: int = GENERATED,
) -> list[tuple[list[int], int]]:
    """Return (ids, number of prefill ids) for every text. Raises InputError."""
    if tokens is None and prompts:
        from adapter_merge.export.engine.prompting import Prompter

        prompter = Prompter(folder)
        texts = []
        for text in prompts:
            prompt = prompter.encode(text)
            texts.append((prompt + torch_greedy(model, prompt, generated), len(prompt)))
        return texts
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    ids = list(tokens) if tokens is not None else sample_tokens(vocabulary, min(TOKENS, longest))
    if len(ids) < 2 or not all(0 <= token < vocabulary for token in ids):
        raise InputError("tokens are wrong", expected=f"at least 2 ids below {vocabulary}", got=str(ids[:8]))
    return [(ids, max(1, min(PROMPT, len(ids) // 2)))]


def torch_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Return the next `count` greedy tokens of torch, including end tokens."""
    import torch

    cache, fed, chosen = None, torch.tensor([list(prompt)]), []
    with torch.no_grad():
        for _ in range(count):
            result = model(input_ids=fed, **cache_argument(cache), use_cache=True)
            cache, token = cache_of(result), int(result.logits[0, -1].argmax())
            chosen.append(token)
            fed = torch.tensor([[token]])
    return chosen


def torch_logits(model: Any, tokens: Sequence[int]) -> Any:
    """Return logits (positions, vocabulary), float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float().numpy()


def onnx_logits(decoder: Decoder, adapter: str | None, tokens: Sequence[int], prompt: int) -> Any:
    """Return logits (positions, vocabulary), float32: `prompt` tokens at once, the rest singly through the cache."""
    import numpy as np

    ids = np.asarray([list(tokens)], np.int64)
    cache = decoder.start(ids.shape[1], adapter)
    rows = [decoder.step(cache, ids[:, :prompt])[0]]
    rows.extend(decoder.step(cache, ids[:, index : index + 1])[0] for index in range(prompt, ids.shape[1]))
    return np.concatenate(rows)
