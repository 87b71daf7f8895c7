"""Parity of an exported classifier with the adapter as trained, over padded batches of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_merge.merge.checkpoint import open_checkpoint
from adapter_merge.merge.errors import UnsupportedError

from .classifying import Classifier
from .folder import Manifest

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
) -> dict[str, Any]:
    """See verification.verify_onnx: the same figures, over texts instead of tokens."""
    import numpy as np
    import torch

    from .verification import check_base, find_adapter, reference_model, sample_tokens

    checkpoint = open_checkpoint(base)
    classifier = Classifier(folder, device)
    check_base(folder, classifier.layout.base, checkpoint.fingerprint, base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    model = reference_model(base, adapter)
    if type(_inner(model)).__name__ != manifest.options.get("class"):
        raise UnsupportedError(
            f"{folder}: traced as {manifest.options.get('class')}, but {base} is a {type(_inner(model)).__name__}",
            hint="verify against a base whose config names the task's class",
        )
    limits = model.config.max_position_embeddings - 4
    texts, worst, largest, differs = 0, 0.0, 0.0, 0
    for length in sorted({min(length, limits) for length in LENGTHS}):
        ids = np.asarray(sample_tokens(model.config.vocab_size - 6, 3 * length)).reshape(3, length) + 5
        mask = np.ones_like(ids)
        mask[1, length - length // 4 :] = 0
        mask[2, length // 2 :] = 0
        ids[mask == 0] = model.config.pad_token_id or 0
        got = classifier.run(ids, mask, None if manifest.mode == "merged" else chosen)
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        for output, logits in got.items():
            wanted = expected[output].float().numpy()
            if logits.ndim > 2 or output != "logits":  # per position: padding means nothing
                logits, wanted = logits[mask == 1], wanted[mask == 1]
            worst = max(worst, float(np.abs(logits - wanted).max()))
            largest = max(largest, float(np.abs(wanted).max()))
            differs += int((logits.argmax(-1) != wanted.argmax(-1)).sum()) if logits.ndim > 1 else 0
        texts += len(ids)
    limit = BAR if bar is None else bar
    return {
        "artefact": str(folder),
        "mode": manifest.mode,
        "precision": manifest.precision,
        "adapter": chosen or "base",
        "compared_with": "the adapter as trained, in torch float32" if adapter else "the base, in torch float32",
        "texts": texts,
        "bar": limit,
        "max_abs_difference": worst,
        "argmax_differs": differs,
        "largest_logit": largest,
        "passed": worst <= limit and differs == 0,
    }


def _inner(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
