"""A base's tensors by the names that transformers' model gives them: transformers' own mapping, applied to headers.

A checkpoint on the hub often names its tensors otherwise than the model that is trained: `language_model.model.layers`
for `model.language_model.layers`, one tensor per expert for a stack of all of them, one fused tensor for q, k and v.
transformers 5 carries the mapping between the two (conversion_mapping.py, core_model_loading.py) and applies it when it
loads a model. Here the same functions are applied to the names in the headers, and the same operations to numbers of
rows instead of weights: each stored tensor (..., out, in) enters as (..., out, 1) int64, every element the number of
its row. What comes out of an operation tells for every row of the model's parameter which stored row it is.

The model is made without weights, on the meta device. transformers is imported only here, and only when it is needed.
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
# Operations that move whole rows, or turn a matrix round; what else transformers does to a tensor is refused.
ROW_OPERATIONS = ("MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split", "Interleave", "Transpose",
                  "PermuteForRope", "ErnieFuseAndSplitTextVisionExperts")  # fmt: skip
NUMBER_BITS = 40  # a row's label: number of its tensor << 40 | number of the row


@dataclass(frozen=True)
class StoredRows:
    """Consecutive rows of a stored tensor's 2-D view, and which rows of the model's parameter they are."""

    ref: TensorRef
    rows: tuple[int, int]  # of the stored tensor
    own: tuple[int, int]  # of the parameter's 2-D view; of its transpose where `turned`
    turned: bool = False  # the stored tensor holds the last two dimensions the other way round


@dataclass
class TransformersNames:
    """The parameters of one transformers class, and the rows of the checkpoint that each is made of."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]  # parameter (and saved buffer) -> shape
    held: Mapping[str, TensorRef]
    model: Any  # on the meta device
    renamings: Sequence[Any]
    converters: Sequence[Any]
    by_model_name: dict[str, TensorRef] = field(default_factory=dict)  # stored tensors, renamed but not converted
    _sources: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)  # name -> (stored name, pattern)
    _groups: dict[str, str] = field(default_factory=dict)  # further target of a converter -> its first one
    _rows: dict[str, tuple[StoredRows, ...]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # parameter -> why its rows cannot be told

    def __post_init__(self) -> None:
        from transformers.core_model_loading import dot_natural_key

        first_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        for key in sorted(self.held, key=dot_natural_key):
            self.by_model_name[self.renamed(key)] = self.held[key]
            name, pattern = self._renamed(key)
            self._sources.setdefault(name, []).append((key, pattern))
            if pattern is not None:
                targets = first_pattern[pattern].target_patterns
                for target in targets[1:]:
                    self._groups[name.replace(targets[0], target)] = name

    def parameter(self, name: str) -> str | None:
        """The parameter that an adapter means by `name`, in this model's names or in a checkpoint's; None: neither."""
        if name in self.shapes:
            return name
        renamed, pattern = self._renamed(name)
        return renamed if renamed in self.shapes and pattern is None else None

    def renamed(self, name: str) -> str:
        """`name`, of a tensor in a checkpoint, as the model has it before tensors are put together or taken apart."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self.renamings, [], self.model.base_model_prefix, self.shapes)[0])

    def contradiction(self, name: str) -> str | None:
        """The other parameter that the checkpoint's tensor `name` is loaded as, where `name` is a parameter as well."""
        if name not in self.shapes or name not in self.held:
            return None
        other = self._renamed(name)[0]
        return None if other == name else other

    def rows_of(self, parameter: str) -> tuple[StoredRows, ...]:
        """Where the rows of `parameter` are stored, in order; () where they are not, or where that cannot be told.

        The reason for the latter is added to `failures`.
        """
        if parameter not in self._rows:
            self._convert(self._groups.get(parameter, parameter))
        return self._rows.setdefault(parameter, ())

    def whole(self, parameter: str) -> TensorRef | None:
        """The one stored tensor that is `parameter`, unchanged; None where there is none."""
        found = self.rows_of(parameter)
        if len(found) != 1 or found[0].turned:
            return None
        ref = found[0].ref
        return ref if ref.shape[1:] == self.shapes[parameter][1:] and found[0].rows == (0, ref.rows) else None

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(name in the model, pattern of the converter or None), as transformers loads a tensor called `name`."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.shapes)
        if renamed not in self.shapes and name in self.shapes:
            renamed, pattern = rename_source_key(name, [], [], prefix, self.shapes)
        return renamed, pattern

    def _convert(self, first: str) -> None:
        """Find the rows of the parameter `first` and of all that are made together with it."""
        import torch

        sources = self._sources.get(first, [])
        if not sources:
            return
        refs = [self.held[key] for key, _ in sources]
        pattern = sources[0][1]
        if pattern is None:
            ref = refs[-1]  # of two tensors of one name the last is loaded
            if (first in self.shapes and math.prod(self.shapes[first]) == math.prod(ref.shape)) or len(refs) == 1:
                self._rows[first] = (StoredRows(ref, (0, ref.rows), (0, ref.rows)),)
            return
        if any(len(ref.shape) < 2 for ref in refs):
            self.failures[first] = "vectors that are put together"
            return
        converter = deepcopy(next(one for one in self.converters if pattern in one.source_patterns))
        unknown = [type(one).__name__ for one in converter.operations if type(one).__name__ not in ROW_OPERATIONS]
        if unknown:
            self.failures[first] = f"transformers makes it by {', '.join(unknown)}"
            return
        for operation in converter.operations:
            if getattr(operation, "check_dims", False):  # turned unless the whole shape is right already
                if refs[0].shape == self.shapes.get(first):
                    self._rows[first] = (StoredRows(refs[0], (0, refs[0].rows), (0, refs[0].rows)),)
                    return
                operation.check_dims = False
        for number, ((key, own_pattern), ref) in enumerate(zip(sources, refs, strict=True)):
            labels = torch.arange(ref.rows) + (number << NUMBER_BITS)
            converter.add_tensor(first, key, own_pattern, labels.view(*ref.shape[:-1], 1))
        try:
            made = converter.convert(first, model=self.model, config=self.model.config)
        except Exception as error:  # an operation that needs the weights themselves
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
                self._rows[name] = tuple(_runs(value.reshape(-1), refs, shape[-2:], turned=False))
            elif tuple(value.shape) == turned and widths == {shape[-2]}:
                self._rows[name] = tuple(_runs(value.reshape(-1), refs, shape[-2:], turned=True))
            else:
                self.failures[name] = "transformers puts it together from columns, or from another number of rows"


def _runs(labels: Any, refs: Sequence[TensorRef], matrix: Sequence[int], *, turned: bool) -> Iterator[StoredRows]:
    """The consecutive stored rows in `labels` (rows of the parameter,), cut where a matrix of a stack ends."""
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


def transformers_names(base: Checkpoint, config: Mapping[str, Any]) -> tuple[list[TransformersNames], str]:
    """The names of `base` in every class that an adapter with this config may have been trained in, likeliest first.

    The second value is why there are none: transformers is missing or too old, or it does not know the model.
    """
    if not isinstance(base.config.get("model_type"), str):
        return [], "config.json names no model_type"
    try:
        importlib.import_module("transformers.core_model_loading")
    except ImportError as error:
        return [], f"transformers 5 is not installed ({error})"
    found: list[TransformersNames] = []
    reasons: list[str] = []
    for name in _architectures(base, config):
        try:
            made = _names_in(base, name)
        except Exception as error:  # whatever a model's code raises for a config that it does not take
            reasons.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        if made is not None and all(made.architecture != other.architecture for other in found):
            found.append(made)
    return found, "; ".join(reasons)


def _architectures(base: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    """Names of transformers' classes: as the adapter says, by its task, as the base says, the bare model."""
    said = config.get("auto_mapping")
    if isinstance(said, dict) and isinstance(said.get("base_model_class"), str):
        yield said["base_model_class"]
    own = base.config.get("architectures")
    task = AUTO_CLASSES.get(str(config.get("task_type")))
    if task is not None and task != "AutoModelForCausalLM":
        yield task
    if isinstance(own, list) and own and isinstance(own[0], str):
        yield own[0]
    if task is not None:
        yield task
    yield "AutoModel"


def _names_in(base: Checkpoint, architecture: str) -> TransformersNames | None:
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
    with _quiet():
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of transformers on configs; nothing is loaded here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
