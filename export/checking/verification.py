"""Comparison of an ONNX export with the adapter as trained, by logits that are computed with the KV cache.

Torch computes every text in one forward, with the live, unmerged adapter (PEFT, or the method's own forward). The
export computes it as a server does: the prompt in one step, then token by token. All logits of both phases and the
greedy choice at every position are compared. Of what torch.onnx traced (encoders, GPT-2) the weights are compared as
well, see traced_proof.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError
from adapter_merge.export.engine.decoder_session import Decoder
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.contents import folder_layout, read_export
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.verification.key_value_cache import cache_argument, cache_of

from .encoder_verification import verify_encoder
from .traced_proof import is_traced, verify_traced_weights
from .verdict import TOKENS, TOLERANCES, check_base, find_adapter, header, reference_model, sample_tokens, verdict

PROMPT = 96  # positions of TOKENS that are computed in one step
GENERATED = 64  # greedy tokens after each prompt
Text = tuple[list[int], int]  # token ids, and how many of them are computed in one step


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
    tolerance: float | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> dict[str, Any]:
    """Compare the export in `artefact` with `adapter` on `base` as trained (None: with the base alone).

    name: the adapter's name in a switchable or batched export; None: the adapter whose source is `adapter`. prompts:
    texts; each is followed by the `generated` greedy tokens of torch. tokens: token ids to compare over. Without
    prompts and tokens, 256 deterministic token ids. device: "cpu" or "cuda", of the export. tolerance: the largest
    difference of a logit that passes; None: that of the precision (fp32 1e-3). An int4 export has none, because
    quantisation changes logits by whole units. base_kind, options: settings of the adapter that its files do not state.

    Returns figures, "problems" and "passed". Raises InputError or MismatchError when base, adapter and artefact do not
    belong together.
    """
    folder = Path(artefact)
    check_packages("onnx_ir", "transformers")
    manifest = read_export(folder)
    if tolerance is None and manifest.precision not in TOLERANCES:
        raise InputError(
            f"{folder}: an {manifest.precision} export differs from the trained model by its quantisation",
            hint="state the largest difference of a logit that passes: --tolerance",
        )
    adapter_settings: dict[str, Any] = {"name": name, "base_kind": base_kind, "options": options}
    if manifest.kind != "decoder":
        if prompts:
            raise InputError(f"{folder}: an encoder is compared on token ids", hint="leave --prompt out")
        report = verify_encoder(base, adapter, folder, manifest, device=device, tolerance=tolerance, **adapter_settings)
    else:
        chosen = _check_inputs(base, adapter, folder, manifest, name)
        model = reference_model(base, adapter, base_kind, options)
        texts = token_lists(folder, model, prompts, tokens, generated)
        expected = [torch_logits(model, ids) for ids, _ in texts]
        del model  # before the export is loaded
        base_logits = expected if adapter is None else _base_logits(base, texts)
        decoder = Decoder(folder, device)
        name_in_graph = None if manifest.mode == "merged" else chosen
        got = [onnx_logits(decoder, name_in_graph, ids, prompt) for ids, prompt in texts]
        limit = TOLERANCES.get(manifest.precision, 0.0) if tolerance is None else tolerance
        report = {
            **header(folder, manifest, chosen, adapter),
            **_token_counts(texts),
            **verdict(expected, got, base_logits, limit),
        }
    if not is_traced(manifest):
        return report
    return with_weights(report, verify_traced_weights(base, adapter, folder, manifest, **adapter_settings))


def _check_inputs(
    base: str | Path, adapter: str | Path | None, folder: Path, manifest: Manifest, name: str | None
) -> str | None:
    """Return the adapter's name in the export; raise InputError or MismatchError for another base or adapter."""
    check_base(folder, folder_layout(folder).base, open_base(base).fingerprint, base)
    return find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)


def _base_logits(base: str | Path, texts: Sequence[Text]) -> list[Any]:
    model = reference_model(base, None)
    return [torch_logits(model, ids) for ids, _ in texts]


def _token_counts(texts: Sequence[Text]) -> dict[str, int]:
    prefill = sum(prompt for _, prompt in texts)
    positions = sum(len(ids) for ids, _ in texts)
    return {"tokens": positions, "prefill_tokens": prefill, "decode_tokens": positions - prefill}


def with_weights(report: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report on logits, with the figures and problems of the comparison of weights added."""
    problems = [*report["problems"], *weights["problems"]]
    compared = {key: weights[key] for key in ("layers", "compared", "notes")}
    return {**report, **compared, "problems": problems, "passed": not problems}


def token_lists(
    folder: Path,
    model: Any,
    prompts: Sequence[str] | None,
    tokens: Sequence[int] | None,
    generated: int = GENERATED,
) -> list[Text]:
    """Return the token ids of every text, and how many of them are computed in one step; see verify_onnx.

    Raises InputError for fewer than two tokens, and for a token that is not in the vocabulary.
    """
    if tokens is None and prompts:
        from adapter_merge.export.engine.prompting import Prompter

        prompter = Prompter(folder)
        texts = []
        for text in prompts:
            prompt = prompter.encode(text)
            texts.append((prompt + torch_greedy(model, prompt, generated), len(prompt)))
        return texts
    vocabulary = int(model.config.get_text_config().vocab_size)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    ids = list(tokens) if tokens is not None else sample_tokens(vocabulary, min(TOKENS, longest))
    if len(ids) < 2 or not all(0 <= token < vocabulary for token in ids):
        raise InputError(
            "the tokens cannot be compared over", expected=f"at least 2 ids below {vocabulary}", got=str(ids[:8])
        )
    return [(ids, max(1, min(PROMPT, len(ids) // 2)))]


def torch_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Return the `count` greedy tokens of torch that follow the prompt; end-of-text tokens do not end them."""
    import torch

    cache, ids, chosen = None, torch.tensor([list(prompt)]), []
    with torch.no_grad():
        for _ in range(count):
            result = model(input_ids=ids, **cache_argument(cache), use_cache=True)
            cache, token = cache_of(result), int(result.logits[0, -1].argmax())
            chosen.append(token)
            ids = torch.tensor([[token]])
    return chosen


def torch_logits(model: Any, tokens: Sequence[int]) -> Any:
    """Return torch's logits (positions, vocabulary) in float32, from one forward."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float().numpy()


def onnx_logits(decoder: Decoder, adapter: str | None, tokens: Sequence[int], prompt: int) -> Any:
    """Return the export's logits (positions, vocabulary) in float32.

    The first `prompt` tokens are computed in one step, each of the others in a step of its own with the KV cache.
    """
    import numpy as np

    ids = np.asarray([list(tokens)], np.int64)
    cache = decoder.start(ids.shape[1], adapter)
    rows = [decoder.step(cache, ids[:, :prompt])[0]]
    rows.extend(decoder.step(cache, ids[:, index : index + 1])[0] for index in range(prompt, ids.shape[1]))
    return np.concatenate(rows)
