"""Parity of an exported classifier with the adapter as trained, over padded batches of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_merge.errors import UnsupportedError
from adapter_merge.formats.read_options import ReadOptions
from adapter_merge.quantisation.dense_view import open_base

from .classifying import Classifier
from .folder import Manifest
from .verdict import check_base, find_adapter, header, reference_model, sample_tokens, verdict

BAR = 1e-3
LENGTHS = (7, 32, 100, 127)


def verify_encoder(
    base: str | Path,
    adapter: str | Path | None,
    folder: Path,
    manifest: Manifest,
    *,
    name: str | None = None,
    device: str = "cpu",
    bar: float | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> dict[str, Any]:
    """Return the same report as verification.verify_onnx, over texts instead of tokens."""
    import numpy as np
    import torch

    checkpoint = open_base(base)
    classifier = Classifier(folder, device)
    check_base(folder, classifier.layout.base, checkpoint.fingerprint, base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    model = reference_model(base, adapter, base_kind, options)
    if type(_inner(model)).__name__ != manifest.options.get("class"):
        raise UnsupportedError(
            f"{folder}: traced as {manifest.options.get('class')}, but {base} is a {type(_inner(model)).__name__}",
            hint="verify against a base whose config names the task's class",
        )
    bare = reference_model(base, None) if adapter is not None else model
    limits = model.config.max_position_embeddings - 4
    texts, expected, got, plain = 0, [], [], []
    for length in sorted({min(length, limits) for length in LENGTHS}):
        ids = np.asarray(sample_tokens(model.config.vocab_size - 6, 3 * length)).reshape(3, length) + 5
        mask = np.ones_like(ids)
        mask[1, length - length // 4 :] = 0
        mask[2, length // 2 :] = 0
        ids[mask == 0] = model.config.pad_token_id or 0
        answers = classifier.run(ids, mask, None if manifest.mode == "merged" else chosen)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.no_grad():
            wanted, base_answers = model(**inputs), bare(**inputs)
        for output, logits in answers.items():
            rows: tuple[Any, ...] = (logits, wanted[output].float().numpy(), base_answers[output].float().numpy())
            if logits.ndim == 3:  # labels per token: padding means nothing
                rows = tuple(row[mask == 1] for row in rows)
            elif output != "logits":  # a score per token, the best token of every text is the answer
                rows = tuple(np.where(mask == 1, row, 0.0) for row in rows)
            got.append(rows[0])
            expected.append(rows[1])
            plain.append(rows[2])
        texts += len(ids)
    return {
        **header(folder, manifest, chosen, adapter),
        "texts": texts,
        **verdict(expected, got, plain, BAR if bar is None else bar),
    }


def _inner(model: Any) -> Any:
    """Return the transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
