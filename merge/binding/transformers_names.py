"""The tensors of a base by the parameter names of transformers' model: transformers' mapping, applied to headers.

A checkpoint on the hub often names its tensors differently from the model that is trained: it has
`language_model.model.layers` for `model.language_model.layers`, one tensor per expert for a stack of all experts, one
fused tensor for q, k and v.
transformers 5 has the mapping between the two (conversion_mapping.py, core_model_loading.py) and applies it on loading.
This module applies the same functions to the names in the headers, and the same operations to row numbers instead of
weights: each stored tensor (..., out, in) becomes (..., out, 1) int64 whose elements are the numbers of their rows. The
result of an operation gives the stored row for every row of the model's parameter.

The model is built without weights, on the meta device. transformers is imported only here, and only when needed.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

AUTO_CLASSES = {  # task_type of a PEFT config -> the class that PEFT trains it with
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Operations that move whole rows or transpose a matrix; all other operations are refused.
ROW_OPERATIONS = ("MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split", "Interleave", "Transpose",
                  "PermuteForRope", "ErnieFuseAndSplitTextVisionExperts")  # fmt: skip
NUMBER_BITS = 40  # the label of a row is (number of its tensor << 40) | number of the row


@dataclass(frozen=True)
class StoredRows:
    """Consecutive rows of a stored tensor's 2-D view, and the rows of the model's parameter that they hold."""

    ref: TensorRef
    rows: tuple[int, int]  # of the stored tensor
    parameter_rows: tuple[int, int]  # of the parameter's 2-D view; of its transpose where `turned`
    turned: bool = False  # the stored tensor holds the last two dimensions transposed


@dataclass
class TransformersNames:
    """The parameters of one transformers class, and the stored rows from which each is loaded."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]  # parameter (and saved buffer) -> shape
    tensors: Mapping[str, TensorRef]  # of the checkpoint, by their stored names
    model: Any  # on the meta device
    renamings: Sequence[Any]
    converters: Sequence[Any]
    by_model_name: dict[str, TensorRef] = field(default_factory=dict)  # stored tensors, renamed but not converted
    _sources: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)  # name -> (stored name, pattern)
    _groups: dict[str, str] = field(default_factory=dict)  # further target of a converter -> its first one
    _rows: dict[str, tuple[StoredRows, ...]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # parameter -> why its rows are unknown

    def __post_init__(self) -> None:
        from transformers.core_model_loading import dot_natural_key

        first_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        for key in sorted(self.tensors, key=dot_natural_key):
            self.by_model_name[self.rename(key)] = self.tensors[key]
            name, pattern = self._find_parameter(key)
            self._sources.setdefault(name, []).append((key, pattern))
            if pattern is not None:
                targets = first_pattern[pattern].target_patterns
                for target in targets[1:]:
                    self._groups[name.replace(targets[0], target)] = name

    def parameter(self, name: str) -> str | None:
        """Return the parameter called `name`, in the model's names or in a checkpoint's; None where there is none."""
        if name in self.shapes:
            return name
        renamed, pattern = self._find_parameter(name)
        return renamed if renamed in self.shapes and pattern is None else None

    def rename(self, name: str) -> str:
        """Return the model's name of a checkpoint tensor, before tensors are fused or split."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self.renamings, [], self.model.base_model_prefix, self.shapes)[0])

    def contradiction(self, name: str) -> str | None:
        """Return the other parameter that the checkpoint's tensor `name` is loaded as, where both are parameters."""
        if name not in self.shapes or name not in self.tensors:
            return None
        loaded_as = self._find_parameter(name)[0]
        return None if loaded_as == name else loaded_as

    def rows_of(self, parameter: str) -> tuple[StoredRows, ...]:
        """Return the stored rows of `parameter`, in order; () where there are none, or where they are unknown.

        In the latter case the reason is added to `failures`.
        """
        if parameter not in self._rows:
            self._convert(self._groups.get(parameter, parameter))
        return self._rows.setdefault(parameter, ())

    def find_whole_tensor(self, parameter: str) -> TensorRef | None:
        """Return the stored tensor that equals `parameter`; None where the parameter is assembled or transposed."""
        rows = self.rows_of(parameter)
        if len(rows) != 1 or rows[0].turned:
            return None
        ref = rows[0].ref
        return ref if ref.shape[1:] == self.shapes[parameter][1:] and rows[0].rows == (0, ref.rows) else None

    def _find_parameter(self, name: str) -> tuple[str, str | None]:
        """Return (name in the model, pattern of the converter or None) with which transformers loads tensor `name`."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.shapes)
        if renamed not in self.shapes and name in self.shapes:
            renamed, pattern = rename_source_key(name, [], [], prefix, self.shapes)
        return renamed, pattern

    def _convert(self, first: str) -> None:
        """Find the rows of the parameter `first`, and of the parameters that the same converter makes."""
        import torch

        sources = self._sources.get(first, [])
        if not sources:
            return
        refs = [self.tensors[key] for key, _ in sources]
        pattern = sources[0][1]
        if pattern is None:
            ref = refs[-1]  # of two tensors with one name, transformers loads the last
            if (first in self.shapes and math.prod(self.shapes[first]) == math.prod(ref.shape)) or len(refs) == 1:
                self._rows[first] = (StoredRows(ref, (0, ref.rows), (0, ref.rows)),)
            return
        if any(len(ref.shape) < 2 for ref in refs):
            self.failures[first] = "transformers joins it from vectors"
            return
        converter = deepcopy(next(item for item in self.converters if pattern in item.source_patterns))
        unknown = [type(item).__name__ for item in converter.operations if type(item).__name__ not in ROW_OPERATIONS]
        if unknown:
            self.failures[first] = f"transformers makes it by {', '.join(unknown)}"
            return
        for operation in converter.operations:
            if getattr(operation, "check_dims", False):  # transposes unless the shape already fits
                if refs[0].shape == self.shapes.get(first):
                    self._rows[first] = (StoredRows(refs[0], (0, refs[0].rows), (0, refs[0].rows)),)
                    return
                operation.check_dims = False
        for number, ((key, own_pattern), ref) in enumerate(zip(sources, refs, strict=True)):
            labels = torch.arange(ref.rows) + (number << NUMBER_BITS)
            converter.add_tensor(first, key, own_pattern, labels.view(*ref.shape[:-1], 1))
        try:
            made = converter.convert(first, model=self.model, config=self.model.config)
        except Exception as error:  # the operation needs the values of the weights
            self.failures[first] = f"{type(error).__name__}: {error}"[:200]
            return
        for name, labels in made.items():
            value = labels[0] if isinstance(labels, list) else labels
            shape = self.shapes.get(name)
            if shape is None:
                continue
            straight, turned = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
            widths = {ref.shape[-1] for ref in refs}
            if tuple(value.shape) == straight and widths == {shape[-1]}:
                self._rows[name] = tuple(_split_runs(value.reshape(-1), refs, shape[-2:], turned=False))
            elif tuple(value.shape) == turned and widths == {shape[-2]}:
                self._rows[name] = tuple(_split_runs(value.reshape(-1), refs, shape[-2:], turned=True))
            else:
                self.failures[name] = "transformers joins it from columns, or from another number of rows"


def _split_runs(labels: Any, refs: Sequence[TensorRef], matrix: Sequence[int], *, turned: bool) -> Iterator[StoredRows]:
    """Yield the runs of consecutive stored rows in `labels` (rows of the parameter,), cut at each matrix of a stack."""
    import torch

    size = matrix[1] if turned else matrix[0]
    starts = torch.ones(len(labels), dtype=torch.bool)
    starts[1:] = labels[1:] != labels[:-1] + 1
    starts[::size] = True
    edges = [*starts.nonzero()[:, 0].tolist(), len(labels)]
    mask = (1 << NUMBER_BITS) - 1
    for begin, end in itertools.pairwise(edges):
        label = int(labels[begin])
        ref, row = refs[label >> NUMBER_BITS], label & mask
        yield StoredRows(ref, (row, row + end - begin), (begin, end), turned)


def list_transformers_names(base: Checkpoint, config: Mapping[str, Any]) -> tuple[list[TransformersNames], str]:
    """Return the names of `base` in each class that the adapter may have been trained in, the most likely first.

    The second value is the reason for an empty list: transformers is missing, too old, or does not know the model.
    """
    if not isinstance(base.config.get("model_type"), str):
        return [], "config.json names no model_type"
    try:
        importlib.import_module("transformers.core_model_loading")
    except ImportError as error:
        return [], f"transformers 5 is not installed ({error})"
    names: list[TransformersNames] = []
    reasons: list[str] = []
    for name in _architectures(base, config):
        try:
            made = _build_names(base, name)
        except Exception as error:  # model code may raise anything for an unexpected config
            reasons.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        if made is not None and all(made.architecture != known.architecture for known in names):
            names.append(made)
    return names, "; ".join(reasons)


def _architectures(base: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield names of transformers' classes: the adapter's, that of its task, the base's, and AutoModel."""
    auto_mapping = config.get("auto_mapping")
    if isinstance(auto_mapping, dict) and isinstance(auto_mapping.get("base_model_class"), str):
        yield auto_mapping["base_model_class"]
    architectures = base.config.get("architectures")
    task = AUTO_CLASSES.get(str(config.get("task_type")))
    if task is not None and task != "AutoModelForCausalLM":
        yield task
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        yield architectures[0]
    if task is not None:
        yield task
    yield "AutoModel"


def _build_names(base: Checkpoint, architecture: str) -> TransformersNames | None:
    """Build the names of `base` in one class; None where the class does not apply."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = getattr(transformers, architecture, None)
    model_type = base.config["model_type"]
    if kind is None or model_type not in CONFIG_MAPPING:
        return None
    with _silence_transformers():
        config = CONFIG_MAPPING[model_type].from_pretrained(base.folder, local_files_only=True)
        if architecture.startswith("AutoModel"):
            if type(config) not in kind._model_mapping:
                return None
            kind = kind._model_mapping[type(config)]
            kind = kind[0] if isinstance(kind, list | tuple) else kind
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            return None
        with no_tie_weights(), torch.device("meta"), meta_device_safe_creation_ops():
            model = kind(config)
        mapping = get_model_conversion_mapping(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return TransformersNames(
        kind.__name__,
        shapes,
        base.tensors,
        model,
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def build_model(base: Checkpoint, architecture: str) -> Any:
    """Build the model of one class without weights; None where the class does not apply. Raises ImportError."""
    names = _build_names(base, architecture)
    return None if names is None else names.model


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Suppress warnings of transformers about configs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
