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
from adapter_merge.export.engine.encoder_session import Classifier
from adapter_merge.export.folder.export_manifest import Manifest
from adapter_merge.export.graph.encoder_task import BODY, FAMILIES, MASKED, is_body
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
    return _own_class(checkpoint) == name_of_class or is_body(name_of_class) or name_of_class.endswith(MASKED)


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
    name_of_class = manifest.options["class"]
    checkpoint = open_base(base)
    if isinstance(bound, CombinedBound):  # its live model is of the base's own class
        comparable = is_body(name_of_class) or _own_class(checkpoint) == name_of_class
    else:
        comparable = bound is not None or has_body(checkpoint, name_of_class)
    if not comparable:
        raise UnsupportedError(
            f"{base}: is no {name_of_class}, so that there is no live model to hold the export against",
            hint="a base whose config names the class of the task, or --no-check",
        )
    with tempfile.TemporaryDirectory(prefix="adapter-merge-live-") as temporary:
        model, bare = _models(checkpoint, bound, name_of_class, Path(temporary), options)
        return compared(classifier, adapter, model, bare, manifest)


def _models(
    checkpoint: Checkpoint, bound: Any, name_of_class: str, work: Path, options: ReadOptions | None
) -> tuple[Any, Any]:
    """Return the live model of `bound` and the base's, both of the class, in float32; `work` takes links to the base.

    PEFT finds an adapter's layers by name: an adapter of a model with a head goes into that model, one of the body
    into the body, whichever of the two is exported. The body of the first is then what its class computes with; the
    body of the second takes its place in the model with the head.
    """
    from adapter_merge.verification.live_adapter import load_model
    from adapter_merge.verification.live_model import trained_model

    exported = class_folder(checkpoint, work, name_of_class, bound)
    if bound is None or has_body(checkpoint, name_of_class):
        bare: Any = load_model(exported).float()
        if bound is None:
            return bare, bare
    trained = _trained_class(checkpoint, bound, name_of_class)
    folder = class_folder(checkpoint, work, trained, bound)
    if folder != checkpoint.folder:
        bound = open_pair(folder, bound.adapter.folder, bound.base_kind, options)
    model: Any = trained_model(bound)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(inner).__name__ != trained:
        raise UnsupportedError(f"{checkpoint.folder}: the live model is a {type(inner).__name__}, not a {trained}")
    if trained != name_of_class and is_body(name_of_class):
        model = inner.base_model
    elif trained != name_of_class:
        model = load_model(exported).float()
        setattr(model, model.base_model_prefix, inner)
    return model, bare if has_body(checkpoint, name_of_class) else model


def _own_class(checkpoint: Checkpoint) -> str:
    return str((checkpoint.config.get("architectures") or [""])[0])


def _trained_class(checkpoint: Checkpoint, bound: Any, name_of_class: str) -> str:
    """Return the class whose modules an adapter names: the body, or one with a head."""
    import torch

    from adapter_merge.verification.live_adapter import model_config
    from adapter_merge.verification.streamed_model import skeleton

    own = _own_class(checkpoint)
    if isinstance(bound, CombinedBound):  # its names are the checkpoint's
        return own
    config = model_config(checkpoint.folder)
    config.architectures = [FAMILIES[config.model_type] + BODY]
    paths = {path for path, _ in skeleton(config, torch.float32).named_modules()}
    modules = [module.name for module in bound.adapter.modules]
    if modules and paths.issuperset(modules):
        return str(config.architectures[0])
    if not is_body(name_of_class):
        return name_of_class
    return FAMILIES[config.model_type] + MASKED if is_body(own) else own


def class_folder(checkpoint: Checkpoint, work: Path, name_of_class: str, bound: Any) -> Path:
    """Return a folder with the base's files whose config.json names the class: the base's own, or links in `work`.

    The config has as many labels as the head that `bound` brings.
    """
    if _own_class(checkpoint) == name_of_class:
        return checkpoint.folder
    folder = work / name_of_class
    if folder.exists():
        return folder
    folder.mkdir()
    for file in checkpoint.folder.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = {**checkpoint.config, "architectures": [name_of_class]}
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
