"""Comparison of an exported encoder with the live model, on padded batches of several lengths."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

# The largest difference of an output that passes. int8 has no entry: its quantisation changes every output.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 5e-2}
LARGE_OUTPUT = 4.0  # outputs of a larger magnitude raise the tolerance of fp16 in proportion
LENGTHS = (7, 32, 100, 127)  # tokens per text
HEADS = ("classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")


def verify_encoder(
    base: str | Path,
    adapter: str | Path | None,
    folder: Path,
    manifest: Manifest,
    *,
    name: str | None = None,
    device: str = "cpu",
    tolerance: float | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> dict[str, Any]:
    """Return the report of verification.verify_onnx, with "texts", the number of texts, instead of token counts."""
    checkpoint = open_base(base)
    classifier = Classifier(folder, device)
    check_base(folder, classifier.layout.base, checkpoint.fingerprint, base)
    chosen = find_adapter(folder, manifest.adapters, adapter, name, manifest.mode)
    bound = None if adapter is None else open_pair(base, adapter, base_kind, options)
    name_in_graph = None if manifest.mode == "merged" else chosen
    answers = compare_with_live_model(checkpoint.folder, bound, classifier, name_in_graph, manifest, options)
    limit = TOLERANCES[manifest.precision] if tolerance is None else tolerance
    return {
        **header(folder, manifest, chosen, adapter),
        "texts": answers.texts,
        **verdict(answers.expected, answers.got, answers.base, limit),
    }


class Answers(NamedTuple):
    """Outputs of three models for the same texts: lists of arrays of equal shapes."""

    texts: int  # number of texts
    expected: list[Any]  # of the live model
    got: list[Any]  # of the export
    base: list[Any]  # of the live model without the adapter


def compute_answers(
    classifier: Classifier, adapter: str | None, model: Any, base_model: Any, manifest: Manifest
) -> Answers:
    """Return the outputs of `model`, of the export and of `base_model` for padded batches of three texts."""
    import numpy as np
    import torch

    limit = model.config.max_position_embeddings - 4
    answers = Answers(3 * len(_lengths(limit)), [], [], [])
    for length in _lengths(limit):
        ids, mask = _padded_batch(model.config, length)
        outputs = classifier.run(ids, mask, adapter)
        if adapter is not None and manifest.mode == "batched":  # neighbours without the adapter must not change a text
            mixed = classifier.run(ids, mask, [None, adapter, None])
            outputs = {
                name: np.concatenate([values[:1], mixed[name][1:2], values[2:]]) for name, values in outputs.items()
            }
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.no_grad():
            live, live_base = model(**inputs), base_model(**inputs)
        for name, exported in outputs.items():
            expected, base = (_live_output(result, name, mask, manifest) for result in (live, live_base))
            for collected, values in ((answers.expected, expected), (answers.got, exported), (answers.base, base)):
                collected.append(_without_padding(values, name, mask))
    return answers


def _lengths(limit: int) -> list[int]:
    return sorted({min(length, limit) for length in LENGTHS})


def _padded_batch(config: Any, length: int) -> tuple[Any, Any]:
    """Return token ids and attention mask, int64 (3, length): a whole text, three quarters and a half of one."""
    import numpy as np

    ids = np.asarray(sample_tokens(config.vocab_size - 6, 3 * length)).reshape(3, length) + 5
    mask = np.ones_like(ids)
    mask[1, length - length // 4 :] = 0
    mask[2, length // 2 :] = 0
    ids[mask == 0] = config.pad_token_id or 0
    return ids, mask


def _live_output(result: Any, name: str, mask: Any, manifest: Manifest) -> Any:
    """Return an output of transformers' model by its name in the export."""
    if name == "sentence_embedding":
        return _pooled(result.last_hidden_state.numpy(), mask, manifest.options["pooling"])
    return result[name].float().numpy()


def _without_padding(values: Any, name: str, mask: Any) -> Any:
    """Return an output without its values at padded positions: left out, or 0 where a text's best position counts."""
    import numpy as np

    if values.ndim == 3:  # (batch, sequence, labels)
        return values[mask == 1]
    return np.where(mask == 1, values, 0.0) if name.endswith("_logits") else values  # (batch, sequence)


def _pooled(hidden: Any, mask: Any, pooling: Mapping[str, Any]) -> Any:
    """Return the sentence embeddings (batch, width) in float64, computed for each text from its own hidden states.

    hidden: (batch, sequence, width). mask: (batch, sequence).
    """
    import numpy as np

    embeddings = []
    for states, valid in zip(hidden.astype(np.float64), mask, strict=True):
        tokens = states[valid == 1]
        pooled = {"mean": tokens.mean(0), "max": tokens.max(0), "cls": tokens[0], "last": tokens[-1]}
        embedding = pooled[pooling["mode"]]
        embeddings.append(embedding / np.linalg.norm(embedding) if pooling["normalised"] else embedding)
    return np.stack(embeddings)


def has_body(checkpoint: Checkpoint, name_of_class: str) -> bool:
    """Return True when the checkpoint has all weights of the class: its own class, its body, or its masked model."""
    return _own_class(checkpoint) == name_of_class or is_body(name_of_class) or name_of_class.endswith(MASKED)


def check_encoder(
    base: Path, bound: Any, classifier: Classifier, adapter: str | None, manifest: Manifest
) -> dict[str, Any]:
    """Return the verdict on an export with `adapter`, compared with the live model of `bound` (None: the base).

    An int8 export has no tolerance; its outputs must be finite.
    """
    answers = compare_with_live_model(base, bound, classifier, adapter, manifest)
    tolerance = TOLERANCES.get(manifest.precision, float("inf"))
    if manifest.precision == "fp16":
        tolerance *= max(1.0, max(float(abs(values).max()) for values in answers.expected) / LARGE_OUTPUT)
    result = verdict(answers.expected, answers.got, answers.base, tolerance)
    if manifest.precision not in TOLERANCES:
        is_finite = all(bool((abs(values) < float("inf")).all()) for values in answers.got)
        result["problems"] = [] if is_finite else ["its outputs are not finite"]
        result["tolerance"] = None
    return result


def compare_with_live_model(
    base: Path,
    bound: Any,
    classifier: Classifier,
    adapter: str | None,
    manifest: Manifest,
    options: ReadOptions | None = None,
) -> Answers:
    """Return the outputs of the live model of `bound` (None: the base), of the export and of the base.

    Where the base has no head, the live model is the base's body with the adapter's head, as in PEFT's training. Where
    the export has no head, the live model has none. Raises UnsupportedError where the base has no weights of the
    exported class.
    """
    name_of_class = manifest.options["class"]
    checkpoint = open_base(base)
    if isinstance(bound, CombinedBound):  # the live model of a combination has the base's class
        comparable = is_body(name_of_class) or _own_class(checkpoint) == name_of_class
    else:
        comparable = bound is not None or has_body(checkpoint, name_of_class)
    if not comparable:
        raise UnsupportedError(
            f"{base}: is not a {name_of_class}, so that there is no live model to compare the export with",
            hint="export a base whose config.json names this class, or export with --no-check",
        )
    with tempfile.TemporaryDirectory(prefix="adapter-merge-live-") as temporary:
        model, base_model = _models(checkpoint, bound, name_of_class, Path(temporary), options)
        return compute_answers(classifier, adapter, model, base_model, manifest)


def _models(
    checkpoint: Checkpoint, bound: Any, name_of_class: str, work: Path, options: ReadOptions | None
) -> tuple[Any, Any]:
    """Return the live model of `bound` and that of the base, both of the exported class, in float32.

    work: an empty folder for links to the base's files. PEFT finds an adapter's modules by name, so that the adapter is
    loaded into the class that it was trained in. Where the export is the body of that class, the body is taken out of
    the loaded model; where the adapter was trained in the body, the body is put into the class with a head.
    """
    from adapter_merge.verification.live_adapter import load_model
    from adapter_merge.verification.live_model import trained_model

    exported = class_folder(checkpoint, work, name_of_class, bound)
    if bound is None or has_body(checkpoint, name_of_class):
        base_model: Any = load_model(exported).float()
        if bound is None:
            return base_model, base_model
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
    return model, base_model if has_body(checkpoint, name_of_class) else model


def _own_class(checkpoint: Checkpoint) -> str:
    return str((checkpoint.config.get("architectures") or [""])[0])


def _trained_class(checkpoint: Checkpoint, bound: Any, name_of_class: str) -> str:
    """Return the name of the class that the adapter was trained in: the body, or a class with a head."""
    import torch

    from adapter_merge.verification.live_adapter import model_config
    from adapter_merge.verification.streamed_model import skeleton

    own = _own_class(checkpoint)
    if isinstance(bound, CombinedBound):  # its module names are the checkpoint's
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
    """Return a folder with the base's files whose config.json names the class.

    This is the base's own folder where its class is the wanted one, else a folder in `work` with links to the base's
    files. Its config.json states as many labels as the head of `bound` has.
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
