"""Parity of an ONNX export with the adapters as trained: logits, with the KV cache at work.

Every text runs through torch at once, with the adapter live and unmerged (PEFT, or the method's own forward),
and through the export as a server would: the prompt in one step, then token by token. Compared are all logits of
both phases, and the greedy choice at every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_merge.merge.errors import InputError, MismatchError

from .folder import read_export
from .running import Decoder
from .runtime import check_packages
from .switchable import folder_layout

BARS: Mapping[str, float | None] = {"fp32": 1e-3, "fp16": 0.25, "bf16": 2.0, "int4": None}
TOKENS = 256  # positions compared per text
PROMPT = 96  # of them in prefill
CLOSE = 1e-3  # two best logits nearer than this: float32 itself cannot order them


def verify_onnx(
    base: str | Path,
    adapter: str | Path | None,
    artefact: str | Path,
    *,
    name: str | None = None,
    tokens: Sequence[int] | None = None,
    device: str = "cpu",
    bar: float | None = None,
    reference: Any = None,
) -> dict[str, Any]:
    """Hold the export in `artefact` against `adapter` on `base` as trained (None: against the base alone).

    name: the adapter's name in a switchable or batched export; found by its source path when not given. tokens:
    at least 2 token ids; deterministic pseudo-random ones when not given. bar: the largest difference of a logit
    that passes; by precision when not given (fp32 1e-3; an int4 export has none: its figures are reported and
    `passed` is None). reference: a torch model that is loaded already.

    Returns figures and "passed". Raises InputError or MismatchError when the three do not belong together.
    """
    folder = Path(artefact)
    check_packages("onnx_ir", "transformers")
    manifest = read_export(folder)
    if manifest.kind != "decoder":
        from .encoder_verification import verify_encoder

        return verify_encoder(base, adapter, folder, manifest, name=name, device=device, bar=bar)
    from adapter_merge.merge.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(base)
    layout = folder_layout(folder)
    check_base(folder, layout.base, checkpoint.fingerprint, base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    model = reference if reference is not None else reference_model(base, adapter)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = list(tokens) if tokens is not None else sample_tokens(vocabulary)
    if len(ids) < 2 or not all(0 <= token < vocabulary for token in ids):
        raise InputError("tokens are wrong", expected=f"at least 2 ids below {vocabulary}", got=str(ids[:8]))
    prompt = max(1, min(PROMPT, len(ids) // 2))
    expected = torch_logits(model, ids)
    got = onnx_logits(Decoder(folder, device), chosen if manifest.mode != "merged" else None, ids, prompt)
    figures = compare(expected, got, prompt)
    limit = bar if bar is not None else BARS[manifest.precision]
    passed = None if limit is None else figures["max_abs_difference"] <= limit and figures["argmax_differs"] == 0
    return {
        "artefact": str(folder),
        "mode": manifest.mode,
        "precision": manifest.precision,
        "adapter": chosen or "base",
        "compared_with": "the adapter as trained, in torch float32" if adapter else "the base, in torch float32",
        "tokens": len(ids),
        "prefill_tokens": prompt,
        "decode_tokens": len(ids) - prompt,
        "bar": limit,
        **figures,
        "passed": passed,
    }


def check_base(folder: Path, expected: str, got: str, base: str | Path) -> None:
    """Raise MismatchError when an export was not made from `base`."""
    if expected != got:
        raise MismatchError(f"{folder}: not an export of {base}", expected=f"fingerprint {expected[:16]}", got=got[:16])


def find_adapter(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], adapter: str | Path | None, name: str | None, mode: str
) -> str | None:
    """The name under which the export holds `adapter`. Raises InputError when that cannot be told."""
    if adapter is None:
        if mode == "merged" and entries:
            raise InputError(
                f"{folder}: an adapter is merged into it", expected=", ".join(entries), got="no adapter to compare with"
            )
        return None
    if name is not None:
        if name not in entries:
            raise InputError(f"{folder}: no adapter named {name!r}", expected=", ".join(entries) or "none")
        return name
    if len(entries) == 1:
        return next(iter(entries))
    wanted = Path(adapter).resolve()
    found = [key for key, entry in entries.items() if Path(entry["source"]).resolve() == wanted]
    if len(found) != 1:
        raise InputError(
            f"{folder}: which of its adapters is {adapter}?",
            expected=", ".join(entries) or "none",
            hint="say it by name",
        )
    return found[0]


def reference_model(base: str | Path, adapter: str | Path | None) -> Any:
    """The torch model in float32 with the adapter live in it."""
    from adapter_merge.merge.reference import load_model, trained_model

    if adapter is None:
        from adapter_merge.merge.checkpoint import resolve

        return load_model(resolve(base)).float()
    from adapter_merge.merge.merging import open_pair

    return trained_model(open_pair(base, adapter))


def sample_tokens(vocabulary: int, count: int = TOKENS) -> list[int]:
    """The same token ids everywhere: a multiplicative walk over the vocabulary."""
    return [(7919 * (index + 1) + index * index) % vocabulary for index in range(count)]


def torch_logits(model: Any, tokens: Sequence[int]) -> Any:
    """(positions, vocabulary) float32."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float().numpy()


def onnx_logits(decoder: Decoder, adapter: str | None, tokens: Sequence[int], prompt: int) -> Any:
    """(positions, vocabulary) float32: `prompt` tokens at once, the rest one by one through the cache."""
    import numpy as np

    ids = np.asarray([list(tokens)], np.int64)
    cache = decoder.start(ids.shape[1], adapter)
    rows = [decoder.step(cache, ids[:, :prompt])[0]]
    rows.extend(decoder.step(cache, ids[:, index : index + 1])[0] for index in range(prompt, ids.shape[1]))
    return np.concatenate(rows)


def compare(
    expected: Any,  # (positions, vocabulary)
    got: Any,  # (positions, vocabulary)
    prompt: int,
) -> dict[str, Any]:
    """Differences of logits and of greedy choices.

    A greedy choice counts as different unless the two best expected logits are nearer than CLOSE.
    """
    import numpy as np

    if not np.isfinite(got).all():
        return {"max_abs_difference": float("inf"), "argmax_differs": len(expected)}
    gap = np.abs(expected - got)
    best, mine = expected.argmax(1), got.argmax(1)
    rows = np.arange(len(expected))
    differs = (best != mine) & (expected[rows, best] - expected[rows, mine] > CLOSE)
    return {
        "max_abs_difference": float(gap.max()),
        "max_abs_difference_prefill": float(gap[:prompt].max()),
        "max_abs_difference_decode": float(gap[prompt:].max()) if len(gap) > prompt else 0.0,
        "argmax_differs": int(differs.sum()),
        "argmax_agreement": float((best == mine).mean()),
        "largest_logit": float(np.abs(expected).max()),
    }
