"""Parity of an exported classifier with the adapter as trained, over padded batches of several lengths."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import UnsupportedError
from adapter_merge.export.engine.classifying import Classifier
from adapter_merge.export.folder.manifest import Manifest
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base

from .verdict import check_base, find_adapter, header, reference_model, sample_tokens, verdict

BAR = 1e-3
LENGTHS = (7, 32, 100, 127)
HEADS = ("classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")


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
    texts, expected, got, plain = compared(classifier, None if manifest.mode == "merged" else chosen, model, bare)
    return {
        **header(folder, manifest, chosen, adapter),
        "texts": texts,
        **verdict(expected, got, plain, BAR if bar is None else bar),
    }


def compared(
    classifier: Classifier, adapter: str | None, model: Any, bare: Any
) -> tuple[int, list[Any], list[Any], list[Any]]:
    """Return the number of texts, and what `model`, the export and `bare` (the base) answer to padded batches."""
    import numpy as np
    import torch

    limits = model.config.max_position_embeddings - 4
    texts, expected, got, plain = 0, [], [], []
    for length in sorted({min(length, limits) for length in LENGTHS}):
        ids = np.asarray(sample_tokens(model.config.vocab_size - 6, 3 * length)).reshape(3, length) + 5
        mask = np.ones_like(ids)
        mask[1, length - length // 4 :] = 0
        mask[2, length // 2 :] = 0
        ids[mask == 0] = model.config.pad_token_id or 0
        answers = classifier.run(ids, mask, adapter)
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
    return texts, expected, got, plain


def check_encoder(
    base: Path, bound: Any, classifier: Classifier, adapter: str | None, name_of_class: str
) -> dict[str, Any]:
    """Return the verdict on an encoder with `adapter`, held against the live model of `bound` (None: the base).

    Where the base has no head, the adapter's own is put on the base's body, as PEFT does when it trains one.
    """
    from adapter_merge.verification.live_adapter import load_model
    from adapter_merge.verification.live_model import trained_model

    own = (open_base(base).config.get("architectures") or [""])[0] == name_of_class
    if own:
        model: Any = load_model(base).float() if bound is None else trained_model(bound)
        bare = model if bound is None else load_model(base).float()
    elif bound is None or isinstance(bound, CombinedBound):
        raise UnsupportedError(
            f"{base}: is no {name_of_class}, so that there is no live model to check the export against",
            hint="--no-check, or a base whose config names the class of the task",
        )
    else:
        with tempfile.TemporaryDirectory(prefix="adapter-merge-live-") as temporary:
            headed = _with_class(base, Path(temporary), name_of_class, bound)
            model = bare = trained_model(open_pair(headed, bound.adapter.folder, bound.base_kind))
    if type(_inner(model)).__name__ != name_of_class:
        raise UnsupportedError(f"{base}: the live model is a {type(_inner(model)).__name__}, not a {name_of_class}")
    _, expected, got, plain = compared(classifier, adapter, model, bare)
    return verdict(expected, got, plain, BAR)


def _with_class(base: Path, folder: Path, name_of_class: str, bound: Any) -> Path:
    """Fill `folder` with links to the files of `base` and a config.json of the class whose head `bound` brings."""
    for file in base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = {**open_base(base).config, "architectures": [name_of_class]}
    shapes = [ref.shape for name, ref in bound.replacements.items() if name.endswith(HEADS)]
    if shapes and not name_of_class.endswith("QuestionAnswering"):
        labels = int(shapes[0][0])
        config |= {
            "id2label": {str(index): f"LABEL_{index}" for index in range(labels)},
            "label2id": {f"LABEL_{index}": index for index in range(labels)},
        }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _inner(model: Any) -> Any:
    """Return the transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
