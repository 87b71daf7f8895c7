"""Parity of an exported encoder with the adapter as trained, over padded batches of several lengths."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.errors import UnsupportedError
from adapter_merge.export.engine.classifying import Classifier
from adapter_merge.export.folder.manifest import Manifest
from adapter_merge.export.graph.encoder_task import MASKED, is_body
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.checkpoint import Checkpoint

from .verdict import check_base, find_adapter, header, sample_tokens, verdict

BARS: Mapping[str, float] = {"fp32": 1e-3, "fp16": 5e-2}  # int8 has none: its quantisation moves every answer
LOUD = 4.0  # values above this raise the bar of fp16 in proportion
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
    bound = None if adapter is None else open_pair(base, adapter, base_kind, options)
    held = None if manifest.mode == "merged" else chosen
    texts, expected, got, plain = live_answers(checkpoint.folder, bound, classifier, held, manifest, options)
    return {
        **header(folder, manifest, chosen, adapter),
        "texts": texts,
        **verdict(expected, got, plain, BARS[manifest.precision] if bar is None else bar),
    }


def compared(
    classifier: Classifier, adapter: str | None, model: Any, bare: Any, manifest: Manifest
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
        if adapter is not None and manifest.mode == "batched":  # neighbours without it, which must not change it
            mixed = classifier.run(ids, mask, [None, adapter, None])
            answers = {
                output: np.concatenate([values[:1], mixed[output][1:2], values[2:]])
                for output, values in answers.items()
            }
        with torch.no_grad():
            wanted, base_answers = model(**inputs), bare(**inputs)
        for output, logits in answers.items():
            if output == "sentence_embedding":
                pooling = manifest.options["pooling"]
                live, base_live = (
                    _pooled(one.last_hidden_state.numpy(), mask, pooling) for one in (wanted, base_answers)
                )
                rows: tuple[Any, ...] = (logits, live, base_live)
            else:
                rows = (logits, wanted[output].float().numpy(), base_answers[output].float().numpy())
            if logits.ndim == 3:  # labels per token: padding means nothing
                rows = tuple(row[mask == 1] for row in rows)
            elif output.endswith("_logits"):  # a score per token, the best token of every text is the answer
                rows = tuple(np.where(mask == 1, row, 0.0) for row in rows)
            got.append(rows[0])
            expected.append(rows[1])
            plain.append(rows[2])
        texts += len(ids)
    return texts, expected, got, plain


def _pooled(hidden: Any, mask: Any, pooling: Mapping[str, Any]) -> Any:
    """Return the sentences' vectors (batch, width) in float64, text by text, from its hidden states alone."""
    import numpy as np

    rows = []
    for states, valid in zip(hidden.astype(np.float64), mask, strict=True):
        tokens = states[valid == 1]
        how = {"mean": tokens.mean(0), "max": tokens.max(0), "cls": tokens[0], "last": tokens[-1]}
        row = how[pooling["mode"]]
        rows.append(row / np.linalg.norm(row) if pooling["normalised"] else row)
    return np.stack(rows)


def has_body(checkpoint: Checkpoint, name_of_class: str) -> bool:
    """Return True when the checkpoint holds the weights of the class: its own, its body's, or its pretraining's."""
    own = (checkpoint.config.get("architectures") or [""])[0]
    return own == name_of_class or is_body(name_of_class) or name_of_class.endswith(MASKED)


def check_encoder(
    base: Path, bound: Any, classifier: Classifier, adapter: str | None, manifest: Manifest
) -> dict[str, Any]:
    """Return the verdict on an encoder with `adapter`, held against the live model of `bound` (None: the base)."""
    _, expected, got, plain = live_answers(base, bound, classifier, adapter, manifest)
    bar = BARS.get(manifest.precision, float("inf"))
    if manifest.precision == "fp16":
        bar *= max(1.0, max(float(abs(values).max()) for values in expected) / LOUD)
    result = verdict(expected, got, plain, bar)
    if manifest.precision not in BARS:
        finite = all(bool((abs(values) < float("inf")).all()) for values in got)
        result["problems"] = [] if finite else ["its answers are not finite"]
        result["tolerance"] = None
    return result


def live_answers(
    base: Path,
    bound: Any,
    classifier: Classifier,
    adapter: str | None,
    manifest: Manifest,
    options: ReadOptions | None = None,
) -> tuple[int, list[Any], list[Any], list[Any]]:
    """Return what `compared` does, of the live model of `bound` (None: the base) and of the base.

    Where the base has no head, the adapter's own is put on the base's body, as PEFT does when it trains one; where the
    export has none, the base's is left out.
    """
    from adapter_merge.verification.live_adapter import load_model
    from adapter_merge.verification.live_model import trained_model

    name_of_class = manifest.options["class"]
    checkpoint = open_base(base)
    own = (checkpoint.config.get("architectures") or [""])[0] == name_of_class
    if not own and (isinstance(bound, CombinedBound) or (bound is None and not has_body(checkpoint, name_of_class))):
        raise UnsupportedError(
            f"{base}: is no {name_of_class}, so that there is no live model to hold the export against",
            hint="a base whose config names the class of the task, or --no-check",
        )
    with tempfile.TemporaryDirectory(prefix="adapter-merge-live-") as temporary:
        folder = base
        if not own:
            folder = _with_class(base, Path(temporary), name_of_class, bound)
            bound = None if bound is None else open_pair(folder, bound.adapter.folder, bound.base_kind, options)
        model: Any = load_model(folder).float() if bound is None else trained_model(bound)
        bare = model
        if bound is not None and has_body(checkpoint, name_of_class):
            bare = load_model(folder).float()
        if type(_inner(model)).__name__ != name_of_class:
            raise UnsupportedError(f"{base}: the live model is a {type(_inner(model)).__name__}, not a {name_of_class}")
        return compared(classifier, adapter, model, bare, manifest)


def _with_class(base: Path, folder: Path, name_of_class: str, bound: Any) -> Path:
    """Fill `folder` with links to the files of `base` and a config.json of the class whose head `bound` brings."""
    for file in base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = {**open_base(base).config, "architectures": [name_of_class]}
    replaced = {} if bound is None else bound.replacements
    shapes = [ref.shape for name, ref in replaced.items() if name.endswith(HEADS)]
    if shapes and not is_body(name_of_class) and not name_of_class.endswith("QuestionAnswering"):
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
